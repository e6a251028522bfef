"""Our prompts as vLLM's requests, by token ids, and the check that vLLM reads the very tokens that the trainer has.

A request holds the ids of the chat text with its one video placeholder, which vLLM expands to timestamps and video
tokens, and the ids of what the model has written so far; nothing is tokenised a second time.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from verl.types import VideoPrompt


class PromptForm:
    """The form of prompts that the installed vLLM needs. Call `learn` first. `device`: where frames become patches.

    transformers from 5.10 on expands the video token alone and keeps the vision start and end around it; vLLM as old
    as 0.24 replaces all three. There a second start and end around them give the same tokens.
    """

    def __init__(self, folder: Path, tokenizer, device: torch.device) -> None:
        self.processor_arguments = {"do_resize": False, "device": device.type}  # frames come sampled and resized
        config = AutoConfig.from_pretrained(folder)
        self.tokenizer = tokenizer
        start, pad, end = tokenizer.convert_ids_to_tokens(
            [config.vision_start_token_id, config.video_token_id, config.vision_end_token_id]
        )
        self.placeholder, self.wrapped_placeholder = f"{start}{pad}{end}", f"{start}{start}{pad}{end}{end}"
        self.wraps_video: bool | None = None

    def learn(self, prompt: VideoPrompt, llm) -> None:
        """Find the form, once, by trying any prompt on an engine that has no other request.

        Raises ValueError when neither form gives the trainer's ids.
        """
        if self.wraps_video is not None:
            return
        ids_by_form = {}
        for wraps_video in (False, True):
            self.wraps_video = wraps_video
            ids_by_form[wraps_video] = _read_ids(llm, self.request(prompt, video_id=f"form-{wraps_video}"))
            if ids_by_form[wraps_video] == prompt.input_ids.tolist():
                return
        self.wraps_video = None
        require_same_prompt(prompt, ids_by_form[False])

    def request(self, prompt: VideoPrompt, *, video_id: str, continuation: Sequence[int] = ()) -> dict:
        """vLLM's request for `prompt` and what follows it. Features are cached under `video_id`."""
        text = prompt.text.replace(self.placeholder, self.wrapped_placeholder) if self.wraps_video else prompt.text
        frames = prompt.video.frames.permute(0, 2, 3, 1).contiguous().numpy()
        metadata = {**prompt.video.metadata, "do_sample_frames": False}
        return {
            "prompt_token_ids": [*self.tokenizer(text, add_special_tokens=False)["input_ids"], *continuation],
            "multi_modal_data": {"video": [(frames, metadata)]},
            "multi_modal_uuids": {"video": [video_id]},
            "mm_processor_kwargs": self.processor_arguments,
        }


def _read_ids(llm, request: dict) -> list[int]:
    """The ids that vLLM makes of a prompt."""
    from vllm import SamplingParams

    add_request(llm, "form", request, SamplingParams(temperature=0, max_tokens=1, detokenize=False))
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                ids = list(output.prompt_token_ids)
    return ids


def add_request(llm, request_id: str, request: dict, parameters, *, priority: int = 0) -> None:
    """Preprocess a request of `PromptForm` and give it to the engine.

    On a GPU frames become patches in a tenth of the time that they take on the host. From there the engine fetches
    them with the batch that needs them; vLLM 0.24 cannot take them from the device.
    """
    (rendered,) = llm.llm_engine.renderer.render_cmpl([request])
    for items in rendered["mm_kwargs"].values():
        for item in filter(None, items):  # None for what the engine has in its cache
            for element in item.values():
                if isinstance(element.data, torch.Tensor):
                    element.data = element.data.cpu()
    llm.llm_engine.add_request(request_id, rendered, parameters, priority=priority)


def require_same_prompt(prompt: VideoPrompt, engine_ids: Sequence[int], continuation: Sequence[int] = ()) -> None:
    """Raise ValueError unless the engine read the trainer's prompt and then `continuation`."""
    trainer_ids = [*prompt.input_ids.tolist(), *continuation]
    if list(engine_ids) == trainer_ids:
        return
    pairs = enumerate(zip(engine_ids, trainer_ids, strict=False))
    index = next((i for i, (theirs, ours) in pairs if theirs != ours), min(len(engine_ids), len(trainer_ids)))
    raise ValueError(
        f"pair {prompt.key.pair_id}, video {prompt.key.side}: vLLM reads a prompt of {len(engine_ids)} tokens, the "
        f"trainer one of {len(trainer_ids)}, different from token {index} on. The versions of vllm and transformers "
        f"do not fit together. Install those of requirements.txt, or set worker.rollout.name=hf."
    )
