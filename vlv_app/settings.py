"""The settings of the page and of the API: what they are called, their ranges, and the sentences about wrong ones."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

LARGEST_SEED = 2**31 - 1


def refusal(sentence: str) -> gr.Error:
    """An error that stays on the page until it is closed, and that writes nothing into the log."""
    return gr.Error(sentence, duration=None, print_exception=False)


@dataclass(frozen=True)
class Setting:
    """A number that visitors choose. `step` is 1 for whole numbers."""

    label: str
    default: float
    minimum: float
    maximum: float
    step: float
    info: str

    def component(self) -> gr.Slider | gr.Number:
        """The input for it, which hands on whatever it gets: [`check`] has the better sentences."""
        if self.maximum == LARGEST_SEED:
            field = gr.Number(self.default, label=self.label, info=self.info, precision=0)
        else:
            precision = 0 if self.step == 1 else None
            field = gr.Slider(
                self.minimum,
                self.maximum,
                self.default,
                step=self.step,
                precision=precision,
                label=self.label,
                info=self.info,
                buttons=[],
            )
        field.preprocess = lambda payload: payload  # type: ignore[method-assign]
        return field

    def check(self, value: Any) -> Any:
        """The number; raises `gr.Error` with a sentence that names the setting and its range."""
        whole = self.step == 1
        try:
            number = int(value) if whole else float(value)
            valid = number == float(value) and self.minimum <= number <= self.maximum
        except (OverflowError, TypeError, ValueError):
            valid = False
        if valid:
            return number
        given = "empty" if value in (None, "") else str(value)[:40]
        kind = "a whole number" if whole else "a number"
        raise refusal(f"{self.label} is {given}: give {kind} from {self.minimum} to {self.maximum}.")


SETTINGS = {
    "max_new_tokens": Setting("Longest caption", 300, 8, 512, 1, "in tokens"),
    "num_beams": Setting("Beams", 1, 1, 8, 1, "1 writes word by word; more search longer"),
    "temperature": Setting("Temperature", 0, 0, 2, 0.05, "0 takes the likeliest words; above 0 they are drawn"),
    "num_captions": Setting("Number of captions", 1, 1, 8, 1, "drawn with a temperature, or the best of the beams"),
    "num_inference_steps": Setting("Steps", 8, 1, 50, 1, "more are slower and finer"),
    "guidance_scale": Setting("Guidance", 2, 1, 10, 0.1, "1 switches it off"),
    "seed": Setting("Seed", 0, 0, LARGEST_SEED, 1, "equal seeds draw the same; another seed draws something else"),
    "num_pictures": Setting("Number of pictures", 1, 1, 8, 1, "from this seed and the next ones, side by side"),
    "share": Setting("Share of the first image", 0.5, 0, 1, 0.01, "the rest is the second's"),
    "num_shares": Setting("Number of shares", 5, 2, 9, 1, "from 0 to 1, for a strip of compositions"),
}


def check_settings(**values: Any) -> dict[str, Any]:
    """The values of settings by name, checked."""
    return {name: SETTINGS[name].check(value) for name, value in values.items()}


def check_search(num_beams: int, temperature: float, num_captions: int) -> None:
    """Settings of the caption that exclude each other; raises `gr.Error`."""
    beams, captions = SETTINGS["num_beams"].label, SETTINGS["num_captions"].label
    if temperature > 0 and num_beams > 1:
        raise refusal(f"Temperature is {temperature} and {beams} is {num_beams}: set one of them to 0 or 1.")
    if temperature == 0 and num_captions > num_beams:
        raise refusal(
            f"{captions} is {num_captions}: give a Temperature above 0 to draw them, or as many {beams} to search."
        )
