"""Captioning a collection in the background, with the package's own captioner."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

from transformers import StoppingCriteriaList

from vlv.captioning.captioner import Captioner
from vlv.captioning.engine import caption_locally
from vlv.captioning.settings import Decoding
from vlv.captioning.sources import Source
from vlv.collection.store import Store
from vlv.images import ImageFile
from vlv_app.work import ReportTokens, Stopped

BATCH = 4  # images at once: captions come steadily, and other visitors' requests are computed between them
UNWATCHED = 120  # seconds after which a run ends that no window has asked about; it can be resumed


class StoppableCaptioner(Captioner):
    """A captioner whose token loop can be ended."""

    def __init__(self, *arguments: Any, stop: Callable[[], bool], **settings: Any):
        super().__init__(*arguments, **settings)
        self.stop = stop

    def generation_arguments(self, names: Any, spelling: Any) -> dict[str, Any]:
        def check(ids: Any) -> None:
            if self.stop():
                raise Stopped

        criteria = StoppingCriteriaList([ReportTokens(check)])
        return {**super().generation_arguments(names, spelling), "stopping_criteria": criteria}


@dataclass
class Run:
    """A run over the images of one collection that have no caption."""

    total: int
    done: int = 0
    ended: str = ""  # the sentence about it, when it is over
    asked: float = field(default_factory=monotonic)  # when a window last asked about it
    stopping: Event = field(default_factory=Event)

    def stop_wanted(self) -> bool:
        return self.stopping.is_set() or monotonic() - self.asked > UNWATCHED

    @property
    def sentence(self) -> str:
        return self.ended or f"Captioning: {self.done} of {self.total}"


class Runs:
    """The runs of all collections, of which one is computed at a time."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self._runs: dict[str, Run] = {}
        self._starting, self._computing = Lock(), Lock()

    def start(self, id: str, store: Store, decoding: Decoding) -> Run:
        """Caption what has no caption yet. A run of the same collection that is going on is left alone."""
        with self._starting:
            run = self._runs.get(id)
            if run is not None and not run.ended:
                return run
            rows, _ = store.rows(show="without caption")
            run = self._runs[id] = Run(len(rows))
        files = [ImageFile(row.location, row.name) for row in rows]
        Thread(target=self._caption, args=(run, store, files, decoding), daemon=True).start()
        return run

    def find(self, id: str) -> Run | None:
        """The last run of a collection, which continues as long as somebody asks about it."""
        run = self._runs.get(id)
        if run is not None:
            run.asked = monotonic()
        return run

    def _caption(self, run: Run, store: Store, files: list[ImageFile], decoding: Decoding) -> None:
        captioner = StoppableCaptioner(self.model, self.processor, decoding, batch_size=BATCH, stop=run.stop_wanted)
        failed = 0
        try:
            with self._computing:
                if run.stop_wanted():  # while another collection's run was computed
                    raise Stopped
                # The pictures are read in this process: the server has threads, which cannot be forked.
                for rows in caption_locally(Source(files, len(files)), set(), captioner, num_workers=0):
                    store.write((row["file_name"], row.get("text"), row.get("error")) for row in rows)
                    run.done += len(rows)
                    failed += sum("error" in row for row in rows)
                    if run.stop_wanted():
                        raise Stopped
            run.ended = f"Done: {run.done - failed} captioned, {failed} could not be read."
        except Stopped:
            run.ended = f"Stopped after {run.done} of {run.total}. Press Caption all to resume."
        except Exception as error:
            run.ended = f"The run ended after {run.done} of {run.total} ({type(error).__name__}): the log says why."
            raise
