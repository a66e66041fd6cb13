"""The one tree of refusals. Each class is a row of docs/reference/errors.md: a stable code, a title, and what a caller should do.

`status` is the HTTP status number that the service answers with (RFC 9110); the command line prints the same code and detail.
The first paragraph of a docstring is the default detail. Details never repeat the contents of a hostile file beyond short, cleaned names.
"""

from __future__ import annotations

import inspect
from typing import ClassVar


class Problem(Exception):
    """Something went wrong inside the guard; the request id finds it in the log."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str | None = None) -> None:
        self.detail = detail or " ".join((inspect.getdoc(type(self)) or "").split("\n\n")[0].split())
        super().__init__(self.detail)


class CheckpointProblem(Problem):
    """The checkpoint cannot be used."""

    status = 422
    code = "checkpoint_invalid"
    title = "Checkpoint cannot be used"


class CheckpointFormat(CheckpointProblem):
    """The file is neither safetensors nor a torch zip archive of tensors; save the state dict with `safetensors.torch.save_file`."""

    status = 415
    code = "checkpoint_format"
    title = "Checkpoint format not taken"


class CheckpointInvalid(CheckpointProblem):
    """The checkpoint is damaged or inconsistent; export it again."""


class CheckpointMismatch(CheckpointProblem):
    """The tensors in the checkpoint do not fit the architecture; name another one with `architecture`."""

    code = "checkpoint_mismatch"
    title = "Checkpoint does not fit the architecture"


class CheckpointDtype(CheckpointProblem):
    """The checkpoint holds weights of a type that is not taken; save them as float32, float64, float16 or bfloat16."""

    code = "checkpoint_dtype"
    title = "Checkpoint dtype not taken"


class CheckpointNotFinite(CheckpointProblem):
    """The checkpoint holds NaN or infinite weights; nothing can be scored with it."""

    code = "checkpoint_not_finite"
    title = "Checkpoint weights are not finite"


class CheckpointDegenerate(CheckpointProblem):
    """The weights cannot belong to a trained classifier."""

    code = "checkpoint_degenerate"
    title = "Checkpoint weights are degenerate"


class SuspectModelUseless(CheckpointProblem):
    """The suspect's clean accuracy is at chance: wrong architecture, wrong class order, or not a trained model."""

    code = "suspect_model_useless"
    title = "Suspect model is at chance"


class CleanSetProblem(Problem):
    """The clean set cannot be used."""

    status = 422
    code = "clean_set_invalid"
    title = "Clean set cannot be used"


class CleanSetFormat(CleanSetProblem):
    """The content is of no format that is taken: send a zip or tar of one folder a class with PNG, JPEG or WebP images, Parquet, safetensors or npz."""

    status = 415
    code = "clean_set_format"
    title = "Clean set format not taken"


class CleanSetInvalid(CleanSetProblem):
    """The clean set is damaged or not laid out as one folder a class."""


class CleanSetSize(CleanSetProblem):
    """The clean set has too few or too many images: it takes 100 to 50,000."""

    code = "clean_set_size"
    title = "Clean set size not usable"


class CleanSetLabels(CleanSetProblem):
    """The labels of the clean set do not fit the classes of the suspect."""

    code = "clean_set_labels"
    title = "Clean set labels do not fit"


class CleanSetDegenerate(CleanSetProblem):
    """The clean set has too few different images to calibrate with."""

    code = "clean_set_degenerate"
    title = "Clean set is degenerate"


class CleanSetMislabelled(CleanSetProblem):
    """The suspect is sure of what it sees and the labels say otherwise throughout: they are shuffled, or belong to other images."""

    code = "clean_set_mislabelled"
    title = "Clean set labels are wrong"


class FprUnreachable(Problem):
    """So few validation images cannot promise so low a false-rejection rate; add images or ask for a higher target."""

    status = 422
    code = "fpr_unreachable"
    title = "Target FPR out of reach"


class ConfigInvalid(Problem):
    """A setting of the calibration is unknown or out of its range."""

    status = 422
    code = "config_invalid"
    title = "Configuration not valid"


class ImageProblem(Problem):
    """The image cannot be read."""

    status = 422
    code = "image_undecodable"
    title = "Image cannot be decoded"


class ImageFormat(ImageProblem):
    """The body is not a PNG, JPEG or WebP image; the content is looked at, not the label."""

    status = 415
    code = "image_format"
    title = "Image format not taken"


class ImageUndecodable(ImageProblem):
    """The image is truncated or damaged."""


class ImageTooSmall(ImageProblem):
    """The image is smaller than 8 pixels on a side."""

    code = "image_too_small"
    title = "Image too small"


class ImageTooLarge(ImageProblem):
    """The image is larger than 8192 pixels on a side or 25 megapixels, or would be larger than 25 megapixels once it is resized."""

    code = "image_too_large"
    title = "Image too large"


class ImageTooComplex(ImageProblem):
    """The image would take far longer to decode than its pixels warrant; save it anew with any usual program."""

    code = "image_too_complex"
    title = "Image too complex"


class ImageMode(ImageProblem):
    """The image's pixels have no one conversion to 8-bit RGB; save it as 8-bit grey, palette, RGB or CMYK."""

    code = "image_mode"
    title = "Image mode not taken"


class ScoreNotFinite(Problem):
    """The guard computed no finite score for this image, so it gives no prediction."""

    status = 503
    code = "score_not_finite"
    title = "No finite score"


class BundleNotReady(Problem):
    """This version of the guard is incomplete, damaged, or of another format; the active version is unchanged."""

    status = 409
    code = "bundle_not_ready"
    title = "Bundle cannot be served"


class NotFound(Problem):
    """There is nothing under this name."""

    status = 404
    code = "not_found"
    title = "Not found"


class Conflict(Problem):
    """This is not possible in the present state."""

    status = 409
    code = "conflict"
    title = "Conflict"


class StorageFull(Problem):
    """The data directory is full; free some space and send the request again."""

    status = 507
    code = "storage_full"
    title = "Storage is full"


class StorageUnwritable(Problem):
    """The data directory cannot be written; mount it for writing, give the server's user the right to, and send the request again."""

    status = 507
    code = "storage_unwritable"
    title = "Storage cannot be written"


class TrainingDiverged(Problem):
    """Finetuning the suspect ended in numbers that are not finite: use the preset `auto`, which tries several learning rates, or, with it, another seed."""

    status = 422
    code = "training_diverged"
    title = "Training diverged"


class OutOfMemory(Problem):
    """The calibration ran out of memory; use fewer or smaller images, or a machine with more."""

    status = 422
    code = "out_of_memory"
    title = "Out of memory"


class TookTooLong(Problem):
    """Reading the files took more processor time than it may; send fewer or smaller ones."""

    status = 422
    code = "took_too_long"
    title = "Reading took too long"


def all_problems(root: type[Problem] = Problem) -> list[type[Problem]]:
    """Every class of the tree, the root first."""
    return [root, *(found for child in root.__subclasses__() for found in all_problems(child))]


def from_code(code: str, detail: str) -> Problem:
    """The problem that another process reported by its code."""
    kinds = {kind.code: kind for kind in reversed(all_problems())}  # reversed: a parent wins over the children that share its code
    return kinds.get(code, Problem)(detail)
