"""Errors of the infrastructure. Like duquant's own they carry facts as attributes and know nothing of HTTP."""
# ruff: noqa: N818  the names say what happened (LeaseLost), as the whole project spells them


class InfraError(Exception):
    """Something went wrong in the infrastructure."""

    def __init__(self, message: str | None = None, **facts: object) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())
        self.facts = facts


class TransientError(InfraError):
    """A server we depend on does not answer or is overloaded. Trying again later may help; workers retry only this."""


class DiskFull(TransientError):
    """The disk of a server we depend on is full."""


class SettingsError(InfraError):
    """The process's settings are missing or malformed."""


class DatabaseUnusable(InfraError):
    """The database refuses to work and will until somebody repairs it: read-only, corrupt, wrong credentials."""


class StorageRefused(InfraError):
    """The object store refuses us: wrong credentials, missing rights, or a bucket that is not ours."""


class ObjectNotFound(InfraError):
    """No such object in the object store."""


class ObjectExists(InfraError):
    """The object exists already and the write asked for it not to."""


class ChecksumMismatch(InfraError):
    """The bytes that arrived are not the bytes that were stored."""


class JobNotFound(InfraError):
    """No such job."""


class JobConflict(InfraError):
    """The job's state does not allow this."""


class IdempotencyMismatch(InfraError):
    """This Idempotency-Key was used for another request."""


class JobChanged(InfraError):
    """The job has changed since the caller read it."""


class DependencyNotFound(InfraError):
    """A job that another should wait for does not exist, or is another tenant's."""


class DependencyFailed(InfraError):
    """A job that another should wait for has failed or was cancelled; nothing would ever start."""


class QuotaExceeded(InfraError):
    """The tenant has as much as it may have. Facts: quota (max_queued, max_running, max_bytes), limit, used."""


class QueueNotFound(InfraError):
    """No such queue."""


class QueueConflict(InfraError):
    """The queue cannot be deleted."""


class QueueChanged(InfraError):
    """The queue is there, or is not, against what the caller expects."""


class TenantNotFound(InfraError):
    """No such tenant."""


class TenantExists(InfraError):
    """There is a tenant with this id already."""


class LeaseLost(InfraError):
    """This claim holds the job no longer; the worker must stop and write nothing."""


class PathForbidden(InfraError):
    """This file is outside the folders that users may name."""


class PathNotFound(InfraError):
    """No such file in the folders that users may name."""


class ModelNotFound(InfraError):
    """No such model."""


class ModelForbidden(InfraError):
    """This model reference is not allowed here."""


class KeyNotFound(InfraError):
    """No such API key."""


class KeyConflict(InfraError):
    """The API key's state does not allow this."""


class WebhookForbidden(InfraError):
    """Webhooks may not be sent to this address."""


class WebhookNotFound(InfraError):
    """No such webhook, or no such delivery."""


class ArtifactNotFound(InfraError):
    """No such artifact."""


class CardOutdated(InfraError):
    """The artifact has another model card by now; make a new one from that."""


class ArtifactConflict(InfraError):
    """The artifact is in use."""


class TextNotFound(InfraError):
    """No such text."""


class TextConflict(InfraError):
    """The text is in use."""


class EvaluationNotFound(InfraError):
    """No such evaluation."""


class BatchNotFound(InfraError):
    """No such batch."""


class StartupError(InfraError):
    """An embedded server did not start."""
