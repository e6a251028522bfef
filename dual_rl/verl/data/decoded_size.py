"""How much decoding a video takes, by its container alone: for videos of strangers, before anything is decoded.

A file of a few kilobytes can announce frames that no machine has memory for; decord would end the process on it.
"""

import av

from verl.data.vision_process import VideoError

GIGAPIXEL = 10**9


def check_decoded_size(path: str, max_gigapixels: float) -> None:
    """Raise VideoError, naming the file, for a video of more pixels in all its frames, or one that does not open.

    Frames are those that the header announces or the file holds as packets, whichever is more; nothing is decoded.
    """
    most = max_gigapixels * GIGAPIXEL
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = next(iter(container.streams.video), None)
            context = None if stream is None else stream.codec_context
            if context is None or not context.width * context.height:
                raise VideoError(f"video without frames of a known size: {path}")
            size = (context.width, context.height)
            num_frames = stream.frames
            if num_frames * size[0] * size[1] <= most:
                num_frames = max(num_frames, _count_packets(container, stream, most / (size[0] * size[1])))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"video does not decode (truncated or damaged?): {path}: {error}") from error
    if num_frames * size[0] * size[1] > most:
        raise VideoError(
            f"video is too large to decode: {path}: {num_frames} frames or more of {size[0]} x {size[1]} pixels, "
            f"where {max_gigapixels:g} gigapixels are the limit; send a shorter or smaller one"
        )


def _count_packets(container: av.container.InputContainer, stream: av.VideoStream, most: float) -> int:
    """Packets of the stream, which are frames; counting ends beyond `most`."""
    count = 0
    for packet in container.demux(stream):
        count += packet.size > 0
        if count > most:
            break
    return count
