"""From a chat request to its captions: the image is fetched and decoded, waits for its batch, and is captioned."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from chat_vlv import find_image, find_words
from prompts_vlv import PROMPT_END, WORDS_IGNORED, prompt_ids, takes_prompts
from vlv.captioning.captioner import Caption, Captioner
from vlv.captioning.decoding import Spelling
from vlv.captioning.engine import read_pixels
from vlv.reading import Readers
from vlv.serving.batching import Batcher, Request
from vlv.serving.chat import ChatRequest
from vlv.serving.completion import Completion
from vlv.serving.pictures import fetch
from wording_vlv import Wishes

PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what the first of its bytes decode to


class NotWritten(RuntimeError):
    """The model failed, through no fault of the request's."""


class Job(NamedTuple):
    """A request that is ready to be captioned."""

    request: Request
    completion: Completion
    begun: str  # how each of the captions begins: by the client's own words, which are not sent back

    def content(self, text: str) -> str:
        """What a caption adds to its beginning."""
        begun = self.begun.lstrip()
        added = text[len(begun) :] if text.startswith(begun.rstrip()) else text
        return added.lstrip() if begun != begun.rstrip() else added


class Service:
    """
    Args:
        captioner: its settings are those of every caption whose request does not ask for others.
        name: what clients call the model.
        largest_image: bytes that an image may have.
        batch_size: images that are captioned at once; `None` as many as fit into memory.
        num_workers: processes that decode images.
    """

    def __init__(
        self, captioner: Captioner, name: str, largest_image: int, batch_size: int | None = None, num_workers: int = 1
    ):
        self.captioner, self.name, self.largest_image = captioner, name, largest_image
        self.readers = Readers(partial(read_pixels, captioner.processor), num_workers)
        self.threads = ThreadPoolExecutor(num_workers, "reader")
        self.batcher = Batcher(captioner, batch_size)

    def close(self) -> None:
        """Ends threads and processes; captions that are being written are finished."""
        self.batcher.stop()
        self.readers.kill()
        self.threads.shutdown()
        self.readers.close()

    async def prepare(self, chat: ChatRequest) -> Job:
        """
        Everything but the captions.

        Raises:
            ValueError: the request is wrong, or its image cannot be read; the sentence says what to change.
        """
        processor, default = self.captioner.processor, self.captioner.decoding
        url = find_image(chat.messages)
        words = find_words(chat.messages)
        prompt = words if takes_prompts(processor) else ""
        begun = processor.apply_chat_template(chat.messages).removeprefix(prompt + PROMPT_END)
        decoding = chat.decoding(default, begun or None)
        own = prompt if chat.style is None else ""  # a style that the request names counts more
        wishes = Wishes(processor, **decoding.wishes)
        spelling = Spelling(decoding, processor.tokenizer, ())
        num_queries = decoding.num_queries or self.captioner.model.config.num_queries
        num_asked = len(prompt_ids(processor.tokenizer, wishes.prompt_for(own)))
        num_prompt_tokens = num_queries + num_asked + len(spelling.prefix_ids)
        self._check_length(num_prompt_tokens + decoding.max_new_tokens, num_asked > 0)
        image = await fetch(url, self.largest_image)
        loop = asyncio.get_running_loop()
        pixel_values = await loop.run_in_executor(self.threads, self.readers, {"bytes": image})
        request = Request(pixel_values, decoding, chat.draw(default), own)
        warning = WORDS_IGNORED if words and not prompt else None
        completion = Completion(self.name, num_prompt_tokens, decoding.max_new_tokens, warning)
        return Job(request, completion, begun)

    async def answer(self, job: Job) -> dict[str, Any]:
        """The whole answer; raises NotWritten."""
        captions = await _written(asyncio.wrap_future(self.batcher.submit(job.request)))
        return job.completion.whole(captions, [job.content(caption.text) for caption in captions])

    async def stream(self, job: Job, include_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        """The answer in chunks, as the captions are written; raises NotWritten."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        job.request.listener = lambda *text: loop.call_soon_threadsafe(news.put_nowait, text)
        sent = [""] * job.request.decoding.num_captions
        for number in range(len(sent)):
            yield job.completion.first_chunk(number)
        captions = asyncio.wrap_future(self.batcher.submit(job.request))
        captions.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (one := await news.get()) is not None:
                number, text = one
                content = job.content(text.strip().rstrip(PART_OF_A_CHARACTER))
                if len(content) > len(sent[number]) and content.startswith(sent[number]):
                    yield job.completion.text_chunk(number, content[len(sent[number]) :])
                    sent[number] = content
            written = await _written(captions)
            for number, caption in enumerate(written):
                if rest := job.content(caption.text)[len(sent[number]) :]:
                    yield job.completion.text_chunk(number, rest)
                yield job.completion.last_chunk(number, caption)
            if include_usage:
                yield job.completion.usage_chunk(written)
        finally:
            captions.cancel()  # the client may have left

    def _check_length(self, tokens, has_prompt):
        positions = getattr(self.captioner.model.config.caption_config, "max_position_embeddings", None)
        if positions is not None and tokens > positions:
            what = "The prompt" if has_prompt else "The assistant's message"
            raise ValueError(
                f"{what} is too long: image, message and caption would have {tokens} tokens, and the model has "
                f"{positions} positions. Shorten it, or lower max_tokens."
            )


async def _written(captions: asyncio.Future[list[Caption]]) -> list[Caption]:
    try:
        return await captions
    except Exception as error:
        raise NotWritten(f"The server failed to write the caption ({' '.join(str(error).split())}).") from error
