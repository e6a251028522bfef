"""Videos from disk: decoded ahead of the step that needs them, and checked before training starts.

A pair with a video that does not decode is dropped as a whole and listed; the video is never replaced by another.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from descore.checked import check_all, digest
from descore.csv_table import CsvError
from verl.data.scored_sequence import SequenceBuilder
from verl.data.vision_process import VideoBudget, VideoError, VideoFrames, VideoHeader, load_video, probe_videos
from verl.types import SIDES, PreferencePair, VideoKey, VideoPrompt

logger = logging.getLogger(__name__)

LENGTH_REMEDY = "lower data.video_fps or data.max_pixels, raise data.max_prompt_length"


class VideoLoader:
    """Decodes and tokenises videos in threads. Close it, or use it as a context manager.

    Decoding releases the interpreter. A lock guards tokenising: tokenizers must not run in two threads at a time.
    """

    def __init__(self, builder: SequenceBuilder, budget: VideoBudget, *, num_threads: int = 4) -> None:
        self.builder = builder
        self.budget = budget
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._lock = threading.Lock()

    def submit(self, key: VideoKey, problem: str, video: str | VideoFrames) -> Future[VideoPrompt]:
        """Start to load a video, a path or sampled frames; the future raises VideoError or ValueError."""
        return self._pool.submit(self._load, key, problem, video)

    def _load(self, key: VideoKey, problem: str, video: str | VideoFrames) -> VideoPrompt:
        if not isinstance(video, VideoFrames):
            video = load_video(video, self.budget, size_factor=self.builder.size_factor)
        with self._lock:
            return self.builder.encode_prompt(key, problem, video)

    def close(self) -> None:
        """Cancel what has not begun and stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PairLoader(VideoLoader):
    """Prepares `pairs`, those of one CSV, `source`, ahead of the step that needs them.

    A pair with a video that no longer loads is dropped as a whole: `dropped` holds the reasons by pair_id.
    `max_dropped_share`: the share of the pairs that may be dropped.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        builder: SequenceBuilder,
        budget: VideoBudget,
        *,
        source: str | Path,
        max_dropped_share: float,
    ) -> None:
        super().__init__(builder, budget)
        self.pairs = pairs
        self.source = source
        self.max_dropped_share = max_dropped_share
        self.dropped: dict[int, str] = {}
        self._pending: dict[VideoKey, Future[VideoPrompt]] = {}

    def prefetch(self, pairs: Sequence[PreferencePair]) -> None:
        """Start to decode the videos that are not being decoded yet, and return at once."""
        for pair in pairs:
            for side, path in zip(SIDES, pair.videos, strict=True):
                key = VideoKey(pair.pair_id, side)
                if key not in self._pending:
                    self._pending[key] = self.submit(key, pair.problem, path)

    def load(self, pairs: Sequence[PreferencePair]) -> list[tuple[PreferencePair, tuple[VideoPrompt, VideoPrompt]]]:
        """The pairs that load, in order, each with its two prompts; decodes now what was not prefetched.

        Warns once per dropped pair. Raises VideoError that lists all dropped pairs of the CSV when they exceed
        `max_dropped_share`.
        """
        self.prefetch(pairs)
        loaded = []
        for pair in pairs:
            prompts, problems = [], []
            for side in SIDES:
                try:
                    prompts.append(self._pending.pop(VideoKey(pair.pair_id, side)).result())
                except VideoError as error:
                    problems.append(f"row {pair.pair_id + 1}, video {side}: {error}")
            if not problems:
                loaded.append((pair, tuple(prompts)))
            elif pair.pair_id not in self.dropped:
                self.dropped[pair.pair_id] = "; ".join(problems)
                logger.warning("%s: pair dropped: %s", self.source, self.dropped[pair.pair_id])
        if len(self.dropped) > self.max_dropped_share * len(self.pairs):
            raise VideoError(
                f"{self.describe_dropped()}\nMore than data.max_dropped_share={self.max_dropped_share:g} of the pairs "
                "were dropped. Replace the files and start the same command again, or raise data.max_dropped_share."
            )
        return loaded

    def describe_dropped(self) -> str:
        """The pairs dropped so far, one line each."""
        heading = f"{self.source}: {len(self.dropped)} of {len(self.pairs)} pairs dropped"
        return "\n".join([heading, *(f"  {self.dropped[pair_id]}" for pair_id in sorted(self.dropped))])


def check_pairs(
    pairs: Sequence[PreferencePair],
    builder: SequenceBuilder,
    budget: VideoBudget,
    *,
    max_prompt_length: int,
    should_filter: bool,
    source: str | Path,
) -> list[PreferencePair]:
    """The pairs whose prompts both fit, after opening every video (its first frame only).

    `source`: the CSV, for messages. With `should_filter`, pairs with a prompt over `max_prompt_length` tokens are left
    out and counted in a warning. Raises CsvError that lists every fault: videos that do not open, texts with reserved
    tokens, prompts that are too long (unless filtered), and no pair left.
    """
    headers = probe_videos((path for pair in pairs for path in pair.videos), budget)
    texts = ((pair.problem, headers[path]) for pair in pairs for path in pair.videos)
    lengths = check_all(
        (text for text in texts if isinstance(text[1], VideoHeader)),
        lambda text: builder.count_prompt_tokens(*text, budget),
        key=lambda text: digest("prompt", builder.fingerprint, budget, text),
        description="texts",
    )
    problems, kept = [], []
    for pair in pairs:
        row, faults, longest = f"row {pair.pair_id + 1}", [], 0
        for side, path in zip(SIDES, pair.videos, strict=True):
            header = headers[path]
            length = lengths.get((pair.problem, header))
            if isinstance(header, VideoError):
                faults.append(f"{row}, video {side}: {header}; replace the file or remove the row")
            elif isinstance(length, ValueError):
                faults.append(f"{row}, video {side}: {length}")
            else:
                longest = max(longest, length)
        if longest > max_prompt_length and not should_filter:
            faults.append(
                f"{row}: prompt of {longest} tokens, over data.max_prompt_length {max_prompt_length}; "
                f"{LENGTH_REMEDY}, or leave rows out (of training: data.filter_overlong_prompts)"
            )
        problems += faults
        if not faults and longest <= max_prompt_length:
            kept.append(pair)
    if not kept and not problems:
        problems.append(f"every prompt is over {max_prompt_length} tokens; {LENGTH_REMEDY}")
    if problems:
        raise CsvError(source, problems)
    if excess := len(pairs) - len(kept):
        message = "%s: %d of %d pairs left out, prompt over %d tokens"
        logger.warning(message, source, excess, len(pairs), max_prompt_length)
    return kept
