"""The scores of `vlv evaluate`: families of scores by name, and what each score needs."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple


class Score(NamedTuple):
    """
    Args:
        metric: the module in `metrics/` that computes it.
        key: its name in that module.
        model: the option that names the pretrained model that it needs, if any.
        images: the smallest number of images that it is defined for.
        also: other options that it needs.
    """

    metric: str
    key: str
    model: str | None = None
    images: int = 1
    also: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The options that must be given."""
        return self.also if self.model is None else (self.model, *self.also)


PICTURES = {
    "fid": Score("frechet", "fid", "feature_extractor", images=2),
    "kid": Score("frechet", "kid", "feature_extractor", images=2),
    "feature_similarity": Score("image_similarity", "similarity", "feature_extractor"),
    "clip_similarity": Score("image_similarity", "similarity", "clip"),
}
# The families: scores of captions, of reconstructions, of pictures drawn from captions, and of answers that a language
# model finds in captions.
FAMILIES = {
    "captions": {
        "cider": Score("cider", "cider", images=2),
        **{name: Score("overlap", name) for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")},
        "clip_score": Score("clip_score", "clip_score", "clip"),
        "text_similarity": Score("text_similarity", "text_similarity", "sentence_encoder"),
        "explained": Score("judge", "explained"),
        **{name: Score("wording", name) for name in ("length", "repetition", "distinct_1", "distinct_2", "ended")},
    },
    "reconstruction": {"psnr": Score("pixels", "psnr"), "ssim": Score("pixels", "ssim"), **PICTURES},
    "caption_to_image": PICTURES,
    "questions": {"accuracy": Score("answers", "accuracy", "llm", also=("questions",))},
}
JUDGE = "judge"  # not a module in `metrics/`: the model itself scores the captions
SCENES = "scenes"  # `SceneScorer` measures it on drawn scenes, not on a dataset
REFERENCED = ("cider", "overlap", "text_similarity")  # the metrics that compare with the dataset's own captions


def find_scores(metrics: str) -> list[tuple[str, str]]:
    """
    The scores that `--metrics` names, as (family, name), in the order of `FAMILIES`.

    Args:
        metrics: families (`captions`) and single scores (`reconstruction/fid`), separated by commas.

    Raises:
        ValueError: for an unknown name.
    """
    asked = [name.strip() for name in metrics.split(",") if name.strip()]
    known = [(family, name) for family, scores in FAMILIES.items() for name in scores]
    names = [*FAMILIES, *(f"{family}/{name}" for family, name in known)]
    if not asked:
        raise ValueError(f"--metrics names nothing; choose from {', '.join([*FAMILIES, SCENES])}.")
    for name in asked:
        if name == SCENES:
            raise ValueError("--metrics scenes must be alone: it draws its own images and takes no dataset.")
        if name not in names:
            near = get_close_matches(name, names, n=1) or [full for full in names if full.endswith(f"/{name}")][:1]
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join([*FAMILIES, SCENES])}"
            raise ValueError(f"--metrics {name} is unknown; {hint}")
    return [(family, name) for family, name in known if family in asked or f"{family}/{name}" in asked]


def check_options(wanted: Sequence[tuple[str, str]], options: Mapping[str, Any]) -> None:
    """
    Raises ValueError when scores need options that were not given. It names them, and the scores that can be measured.

    Args:
        wanted: from [`find_scores`].
        options: the values given, by name; `None` for an option that was not given.
    """
    missing = {
        f"{family}/{name}": [need for need in FAMILIES[family][name].needs if options[need] is None]
        for family, name in wanted
    }
    lacking = {name: " and ".join(f"--{need}" for need in needs) for name, needs in missing.items() if needs}
    if lacking:
        which = ", ".join(f"{name} needs {needs}" for name, needs in lacking.items())
        possible = ",".join(name for name in missing if name not in lacking)
        fix = f"Give that, or leave those scores out: --metrics {possible}" if possible else "Give that."
        raise ValueError(f"{which}. {fix}")
