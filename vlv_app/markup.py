"""What the page shows, as HTML."""

from collections.abc import Sequence
from html import escape

from vlv_app.pictures import Shown
from vlv_app.studio import Step

FEW_PIXELS = 128  # a picture up to this size is drawn with its pixels; a larger one is smoothed


def progress(step: Step) -> str:
    """How far a computation is."""
    value = f' value="{step.done}" max="{step.total}"' if step.total and step.done else ""
    return f'<p>{escape(step.sentence)}</p><progress aria-label="{escape(step.sentence)}"{value}></progress>'


def done(sentence: str) -> str:
    """What came of it. The page announces this to screen readers."""
    return f"<p data-done>{escape(sentence)}</p>"


def figure(shown: Shown, label: str, caption: str = "") -> str:
    """A picture under its label, with a link that downloads it under its own name."""
    look = ' class="few-pixels"' if max(shown.width, shown.height) <= FEW_PIXELS else ""
    words = f"<p>{escape(caption)}</p>" if caption else ""
    return (
        f'<figure><figcaption>{escape(label)}</figcaption><img src="{escape(shown.url)}" alt="{escape(label)}"{look}>'
        f'{words}<a href="{escape(shown.url)}" download="{escape(shown.name)}">Download {escape(shown.name)}</a>'
        "</figure>"
    )


def figures(items: Sequence[str]) -> str:
    """Several figures side by side."""
    return f'<div class="figures">{"".join(items)}</div>'


def comparison(original: Shown, rebuilt: Shown) -> str:
    """Two pictures over each other, with a slider that moves the border between them."""
    # A reconstruction has the decoder's shape; the original's is the one that people know.
    shape = f"aspect-ratio: {original.width} / {original.height}"
    looks = [" few-pixels" if max(each.width, each.height) <= FEW_PIXELS else "" for each in (original, rebuilt)]
    return (
        f'<div class="comparison"><div class="two" style="{shape}">'
        f'<img class="before{looks[0]}" src="{escape(original.url)}" alt="Original">'
        f'<img class="after{looks[1]}" src="{escape(rebuilt.url)}" alt="Reconstruction"></div>'
        "<label>Original to the left, reconstruction to the right of the border"
        '<input type="range" min="0" max="100" value="50"></label></div>'
    )


def captions(texts: Sequence[str]) -> str:
    """Several captions of one picture, best first, each with a button that takes it into the caption box."""
    if len(texts) < 2:
        return ""
    rows = "".join(f'<li><span>{escape(text)}</span> <button type="button">Take</button></li>' for text in texts)
    return f'<ol class="captions">{rows}</ol>'
