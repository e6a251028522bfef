"""Make torchvision's package-index builds importable on a CPU build of PyTorch.

Those builds link their C++ operators to CUDA libraries. On CPU torch they do not load, and `import torchvision` stops
at `operator torchvision::nms does not exist`, although nothing that this project uses (resizing, normalising) needs
one. Declaring the schemas of the missing operators is enough: the import succeeds, and calling such an operator still
fails with torchvision's own message that its C++ operators are not there.

The set-up copies this file into the environment's site-packages, next to a `.pth` file that calls `install()` at every
Python start, so that worker processes are served as well. `install()` imports nothing: torch is touched only when
torchvision itself is being imported. Where torchvision's operators did load, nothing is changed.
"""

import sys

# The first of these that torchvision imports is the moment when the schemas have to exist.
_REGISTRATION_MODULES = frozenset({"torchvision._autograd_registrations", "torchvision._meta_registrations"})

_POOLED = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_INPUT_SHAPE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_QUANTISATION = "float input_scale, int input_zero_point, float rois_scale, int rois_zero_point"
_CONVOLUTION = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask"
)
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": f"(Tensor input, Tensor rois, {_POOLED}, int sampling_ratio, bool aligned) -> Tensor",
    "qroi_align": f"(Tensor input, Tensor rois, {_QUANTISATION}, {_POOLED}, int sampling_ratio, bool aligned)"
    " -> Tensor",
    "roi_pool": f"(Tensor input, Tensor rois, {_POOLED}) -> (Tensor, Tensor)",
    "ps_roi_align": f"(Tensor input, Tensor rois, {_POOLED}, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": f"(Tensor input, Tensor rois, {_POOLED}) -> (Tensor, Tensor)",
    "deform_conv2d": f"({_CONVOLUTION}) -> Tensor",
    "_roi_align_backward": f"(Tensor grad, Tensor rois, {_POOLED}, {_INPUT_SHAPE}, int sampling_ratio, bool aligned)"
    " -> Tensor",
    "_roi_pool_backward": f"(Tensor grad, Tensor rois, Tensor argmax, {_POOLED}, {_INPUT_SHAPE}) -> Tensor",
    "_ps_roi_align_backward": f"(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOLED}, int sampling_ratio, "
    f"{_INPUT_SHAPE}) -> Tensor",
    "_ps_roi_pool_backward": f"(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOLED}, {_INPUT_SHAPE})"
    " -> Tensor",
    "_deform_conv2d_backward": f"(Tensor grad, {_CONVOLUTION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}

_libraries = []  # torch forgets a library's schemas as soon as the library object is collected


def declare_missing_operators() -> None:
    """Declare the schemas that torchvision registers functions for, unless its own operators are there."""
    import torch
    from torchvision import extension

    if extension._has_ops() or _libraries:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, signature in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + signature)
    _libraries.append(library)


class RegistrationHook:
    """A finder that finds nothing: it declares the operators just before torchvision registers functions for them."""

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> None:
        """Called by the import system for every module not yet imported; None lets the search go on as usual."""
        if fullname in _REGISTRATION_MODULES:
            declare_missing_operators()


def install() -> None:
    """Put the hook in front of the other finders; a second call changes nothing."""
    if RegistrationHook not in sys.meta_path:
        sys.meta_path.insert(0, RegistrationHook)
