"""What can go wrong for a user. Each message says what was wrong, with the value seen, and what to
do."""


class CNTLoRAError(ValueError):
    """Base of every error a user can mend. The text is one or two sentences, fit to be shown as it
    is."""

    def __init_subclass__(cls) -> None:
        """ComfyUI shows a class with its module, which would be the path of the custom node."""
        cls.__module__ = "cntlora_core.errors"

    def add_sentence(self, sentence: str) -> None:
        """Tell one more thing after what was said already."""
        self.args = (f"{self} {sentence}", *self.args[1:])


class ImageError(CNTLoRAError):
    """Pictures are missing, unreadable or unusable."""


class CheckpointError(CNTLoRAError):
    """A model file or folder is missing, incomplete, damaged or of a kind CNTLoRA does not
    train."""


class LoRAFileError(CNTLoRAError):
    """A LoRA file cannot be read, or its weights cannot be stored."""


class OutputError(CNTLoRAError):
    """A file cannot be written where it should be."""


class SettingError(CNTLoRAError):
    """A setting is out of range or does not fit the others."""


class OutOfMemory(CNTLoRAError):
    """A device's memory did not suffice; says what to try next."""


class Interrupted(CNTLoRAError):
    """A signal asked the run to end; its work was kept. `status` is the exit status for the
    shell."""

    def __init__(self, message: str, status: int = 130) -> None:
        super().__init__(message)
        self.status = status


class NonFiniteError(CNTLoRAError):
    """A loss or a weight became NaN or infinite. `step` is the step at which it was seen (0: before
    training)."""

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step
