"""Requests that come at any time, captioned in batches: whatever waits when the model is free becomes the next one."""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from transformers import LogitsProcessor

from vlv.captioning.batches import largest_batch
from vlv.captioning.captioner import Caption, Captioner, CaptionReader
from vlv.captioning.decoding import Spelling
from vlv.captioning.settings import Decoding
from wording_vlv import Wording

# Clients that were answered together ask again together. A batch of the first of them alone would cost as many steps
# as one of all, so the next batch waits for as many as the last one had, for this part of the time that it took.
PATIENCE = 0.1
SETTINGS = 32  # different ones whose fitting batch size is remembered


@dataclass(eq=False)
class Request:
    """An image that waits for its captions."""

    pixel_values: torch.Tensor  # (3, H, W)
    decoding: Decoding  # only requests of equal settings share a batch
    seed: str  # of what is drawn
    prompt: str = ""  # its own, in place of that of the settings
    # Called in the model's thread, as captions are written: which of them, and its text so far.
    listener: Callable[[int, str], object] | None = None
    captions: Future[list[Caption]] = field(default_factory=Future)

    def finish(self, captions: list[Caption]) -> None:
        """Answers the request, unless it has been."""
        if not self.captions.done():
            self.captions.set_result(captions)


class Batcher:
    """
    Captions requests in one thread. A request that is cancelled before its batch begins costs nothing.

    Args:
        captioner: whose model, processor and batch size are used.
    """

    def __init__(self, captioner: Captioner, batch_size: int | None = None):
        self.largest = batch_size or largest_batch(captioner.device.type)
        self._captioner = lru_cache(SETTINGS)(
            lambda decoding: _RequestCaptioner(
                captioner.model, captioner.processor, decoding, batch_size, captioner.compile
            )
        )
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._last = (0, 0.0)  # the requests of the last batch, and the seconds that it took
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request) -> Future[list[Caption]]:
        """The captions of a request, as soon as there are any."""
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()
        return request.captions

    def stop(self) -> None:
        """Ends the thread after the batch that it works on; requests that still wait are cancelled."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        for request in self._waiting:
            request.captions.cancel()

    def _work(self):
        while (batch := self._next()) is not None:
            batch = [request for request in batch if request.captions.set_running_or_notify_cancel()]
            if not batch:
                continue
            start = time.monotonic()
            try:
                captions = self._captioner(batch[0].decoding).caption_requests(batch)
            except Exception as error:  # whatever it is, the thread must live on for the other requests
                if not isinstance(error, ValueError):
                    traceback.print_exc()
                for request in batch:
                    if not request.captions.done():
                        request.captions.set_exception(error)
            else:
                for request, written in zip(batch, captions, strict=True):
                    request.finish(written)
            self._last = len(batch), time.monotonic() - start

    def _next(self):
        """The request that waits longest, and others with its settings; `None` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            size, seconds = self._last
            self._changed.wait_for(
                lambda: len(self._waiting) >= min(size, self.largest) or self._stopped, PATIENCE * seconds
            )
            if self._stopped:
                return None
            alike = [it for it in self._waiting if it.decoding == self._waiting[0].decoding][: self.largest]
            self._waiting = deque(request for request in self._waiting if request not in alike)
            return alike


class _RequestCaptioner(Captioner):
    """Captions requests, draws from each one's own seed, and answers those that end before the others."""

    def caption_requests(self, requests: Sequence[Request]) -> list[list[Caption]]:
        self._requests = {str(number): request for number, request in enumerate(requests)}
        prompts = [request.prompt for request in requests]
        pixel_values = [request.pixel_values for request in requests]
        return self(list(self._requests), pixel_values, prompts if any(prompts) else None)

    def generation_arguments(self, names: Sequence[str], spelling: Spelling) -> dict[str, Any]:
        requests = [self._requests[name] for name in names]
        arguments = super().generation_arguments([request.seed for request in requests], spelling)
        # Beams change their text until the search ends, and cleaning and other wishes may drop what was written.
        as_written = all(self.wishes.wording_for(request.prompt).changes_nothing for request in requests)
        if self.decoding.num_beams == 1 and self.repetition is None and as_written:
            progress = _Progress(requests, self.decoding.num_captions, self.reading, spelling)
            arguments["logits_processor"].append(progress)
        return arguments


class _Progress(LogitsProcessor):
    """
    Changes nothing. It passes the text so far to who listens, and captions that have ended to who waits for them, as
    others of the batch may take much longer.
    """

    def __init__(self, requests: Sequence[Request], num_captions: int, reading: CaptionReader, spelling: Spelling):
        self.reading, self.spelling = reading, spelling
        self.rows = [(request, number) for request in requests for number in range(num_captions)]
        self.ended: dict[Request, dict[int, Caption]] = {request: {} for request in requests}
        self.num_captions = num_captions

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.input_ids = input_ids
        if input_ids.shape[1] > 0:
            for (request, number), ids in zip(self.rows, input_ids, strict=True):
                if request.listener is not None:
                    request.listener(number, self.spelling.text(ids.tolist()))
        return scores

    def keep(self, rows: torch.LongTensor) -> None:
        """The other rows ended with the token chosen since `__call__`. Before the last step, it can only be an end."""
        kept = rows.tolist()
        for row in set(range(len(self.rows))).difference(kept):
            request, number = self.rows[row]
            ids = [*self.input_ids[row].tolist(), self.reading.eos_token_ids[0]]
            ended = self.ended[request]
            ended[number] = self.reading(ids, self.spelling, Wording())
            if len(ended) == self.num_captions:
                request.finish([ended[number] for number in range(self.num_captions)])
        self.rows = [self.rows[row] for row in kept]
