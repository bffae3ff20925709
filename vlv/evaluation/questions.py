"""Questions about images. A language model answers them from the captions alone."""

import inspect
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from components_vlv import reading_part
from vlv.evaluation.images import EvaluationData
from vlv.evaluation.vqa import normalise

MAX_NEW_TOKENS = 16  # of a short answer
INSTRUCTION = "Answer the question about an image from its description alone, in a few words."


@dataclass(frozen=True)
class Question:
    """
    Args:
        image: the file name of its image.
        question: its text.
        answers: the right answer, or the answers of at least four annotators.
        choices: the choices of a multiple-choice question, including the right answer.
    """

    image: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()

    def prompt(self, caption: str) -> str:
        """The prompt of the language model, up to the answer."""
        choices = f"\nChoices: {'; '.join(self.choices)}" if self.choices else ""
        return f"Description: {caption}\nQuestion: {self.question}{choices}\nAnswer:"


def read_questions(file: str) -> list[Question]:
    """
    The questions of a JSON Lines file: `image`, `question`, `answer` (a string, or a list of annotators' strings) and,
    for multiple choice, `choices`.

    Raises:
        OSError, ValueError: when there is no such file, or when a line is not a question; the sentence names the line.
    """
    questions = []
    with Path(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    questions.append(_question(json.loads(line)))
                except (ValueError, TypeError, KeyError) as error:
                    reason = f"it has no {error}" if isinstance(error, KeyError) else error
                    raise ValueError(f"{file}, line {number} is not a question: {reason}") from error
    if not questions:
        raise ValueError(f"There are no questions in {file}.")
    return questions


def questions_about(data: EvaluationData, file: str) -> list[Question]:
    """
    The questions of a file, as [`read_questions`], about the images that are measured on.

    Raises:
        OSError, ValueError: those of `read_questions`; or a question is about no image of the dataset, or about
            several of one name; or there are none about these images.
    """
    questions, known = read_questions(file), Counter(data.all_names)
    for question in questions:
        if known[question.image] != 1:
            which = "no image" if question.image not in known else f"the name of {known[question.image]} images"
            raise ValueError(
                f"{file} asks about {question.image}, which is {which} of the dataset {data.name}: image must be a "
                "path below its folder."
            )
    measured = set(data.names)
    asked = [question for question in questions if question.image in measured]
    if not asked:
        raise ValueError(f"{file} asks nothing about the first {len(data)} images.")
    return asked


def _question(row) -> Question:
    if not isinstance(row, dict):
        raise ValueError("it is not an object with image, question, answer and perhaps choices.")
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    question = Question(row["image"], row["question"], tuple(answers), tuple(row.get("choices") or ()))
    texts = (question.image, question.question, *question.answers, *question.choices)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("image, question, answer and choices must be texts that are not empty.")
    if len(answers) not in (1, *range(4, 100)):
        raise ValueError(f"there are {len(answers)} answers; give one, or those of at least four annotators.")
    if question.choices:
        if max(Counter(map(normalise, question.choices)).values()) > 1:
            raise ValueError("two of its choices are the same.")
        if len(answers) > 1 or answers[0] not in question.choices:
            raise ValueError("its answer is not one of its choices.")
    return question


class Answerer:
    """
    A language model that answers questions: any causal language model of transformers.

    The answer to a multiple-choice question is the choice whose tokens have the highest mean likelihood after the
    prompt. The answer to another question is the first line that greedy search writes. If the tokenizer has a chat
    template, the prompt is the user's message.

    Args:
        source: id or folder.
        device: a torch device. On the CPU the model runs in fp32, on other devices in the saved dtype.
        batch_size: prompts at once.
    """

    def __init__(self, source: str, device: str = "cpu", batch_size: int = 50):
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        with reading_part("language model", source):
            self.model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.batch_size = batch_size
        self._accepts = inspect.signature(self.model.forward).parameters

    def answer(self, questions: Sequence[Question], prompts: Sequence[str]) -> Iterator[str]:
        """The answer to each question, from its whole prompt, in order."""
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            written = prompts[start : start + self.batch_size]
            chosen = iter(self._choose([pair for pair in zip(batch, written, strict=True) if pair[0].choices]))
            open_ended = iter(
                self._write([prompt for question, prompt in zip(batch, written, strict=True) if not question.choices])
            )
            yield from (next(chosen) if question.choices else next(open_ended) for question in batch)

    @torch.inference_mode()
    def _write(self, prompts: list[str]) -> list[str]:
        if not prompts:
            return []
        ids, mask = self._pad([self._tokens(prompt)[0] for prompt in prompts])
        written = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.model.generation_config.pad_token_id or 0,
        )
        texts = self.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return [(text.strip().splitlines() or [""])[0].strip() for text in texts]

    @torch.inference_mode()
    def _choose(self, asked: list[tuple[Question, str]]) -> list[str]:
        pairs = [self._tokens(prompt, choice) for question, prompt in asked for choice in question.choices]
        scores = []
        for start in range(0, len(pairs), self.batch_size):
            scores += self._likelihoods(pairs[start : start + self.batch_size])
        best = []
        for question, _ in asked:
            own, scores = scores[: len(question.choices)], scores[len(question.choices) :]
            best.append(question.choices[max(range(len(own)), key=own.__getitem__)])
        return best

    def _likelihoods(self, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
        """The mean log-probability of the second tokens of each pair after the first tokens."""
        ids, mask = self._pad([torch.cat(pair) for pair in pairs])
        longest = max(len(continuation) for _, continuation in pairs)
        extra = {  # only if the model takes them, as in transformers' own generation
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "logits_to_keep": longest + 1,
        }
        extra = {name: value for name, value in extra.items() if name in self._accepts}
        logits = self.model(ids, attention_mask=mask, **extra).logits[:, -longest - 1 : -1]
        chances = logits.float().log_softmax(-1).gather(2, ids[:, -longest:, None])[..., 0]
        return [row[-len(continuation) :].mean().item() for row, (_, continuation) in zip(chances, pairs, strict=True)]

    def _tokens(self, prompt: str, continuation: str = "") -> tuple[Tensor, Tensor]:
        if self.tokenizer.chat_template is None:
            whole = f"{prompt} {continuation}" if continuation else prompt
        else:
            message = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            whole = prompt + continuation
        special = self.tokenizer.chat_template is None  # a chat template adds its own special tokens
        ids, whole_ids = (self.tokenizer(text, add_special_tokens=special).input_ids for text in (prompt, whole))
        for tokens in (ids, whole_ids):
            if special and tokens[-1] == self.tokenizer.eos_token_id:  # an answer cannot follow an end of text
                tokens.pop()
        return torch.tensor(ids), torch.tensor(whole_ids[len(ids) :])

    def _pad(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Token ids and their mask (B, T), padded on the left."""
        ids = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        return ids.to(self.model.device), mask.to(self.model.device)


def write_prompts(questions: Sequence[Question], captions: dict[str, str], shots: int = 0, seed: int = 0) -> list[str]:
    """
    The whole prompt of each question: the instruction, `shots` solved examples, and the question.

    The examples of a question are drawn from the questions about other images. `seed` and the question's number seed
    the draw.

    Args:
        captions: the caption of each image, by file name.
        shots: at most [`most_shots`].
    """
    most = len(questions) - most_shots(questions)  # most questions about one image
    prompts = []
    for number, question in enumerate(questions):
        drawn = random.Random(f"{seed} {number}").sample(questions, min(shots + most, len(questions)))
        examples = [other for other in drawn if other.image != question.image][:shots]
        solved = [f"{other.prompt(captions[other.image])} {_majority(other.answers)}" for other in examples]
        prompts.append("\n\n".join([INSTRUCTION, *solved, question.prompt(captions[question.image])]))
    return prompts


def most_shots(questions: Sequence[Question]) -> int:
    """The largest number of examples that every question can have: the number of questions about other images."""
    return len(questions) - max(Counter(question.image for question in questions).values())


def _majority(answers: Sequence[str]) -> str:
    return Counter(answers).most_common(1)[0][0]
