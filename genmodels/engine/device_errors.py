"""Say what an error of a device means, for a model that is loaded and for the requests of a batch."""

from __future__ import annotations

import torch

from genmodels.errors import GenmodelsError, RequestError, UnexpectedFailure, contained

RETRY_AFTER = 1  # seconds


def load_error(error: Exception, device: str) -> GenmodelsError:
    """Return the reason why a model cannot be loaded; the other models keep serving."""
    if isinstance(error, torch.OutOfMemoryError):
        return UnexpectedFailure(f"out of memory on {device}: unload a model, or give this host less `memory` to fill")
    return contained(error)


def request_error(error: Exception) -> Exception:
    """Return the error that the requests of a batch get; one of the device is no fault of theirs: 503."""
    if isinstance(error, torch.OutOfMemoryError):
        message = "the model's device has no memory for this batch; try again in a moment"
        return RequestError(message, status=503, code="out_of_memory", retry_after=RETRY_AFTER)
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
        message = "the model's device has failed, and this replica is replaced; try again in a moment"
        return RequestError(message, status=503, code="device_failed", retry_after=RETRY_AFTER)
    return error
