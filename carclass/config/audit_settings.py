"""Settings of an audit."""

from carclass.config.section import Name, Section


class AuditSettings(Section):
    """A dataset → near-duplicates, doubtful labels and photos of poor quality, by the backbone of `train`."""

    dataset: Name = "v1"
    """Dataset to audit."""
