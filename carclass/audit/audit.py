"""Audit of a dataset: a table of findings with an action for each, to be edited, and a page of their photos."""

import csv
import io
from typing import NamedTuple

import torch

from carclass import storage
from carclass.audit.collect import AuditedPhotos, read_photos
from carclass.audit.findings import Finding, Kind, count_kinds, find_all
from carclass.audit.report import write_page
from carclass.cluster.device import choose_device
from carclass.config.schema import TrainSettings
from carclass.data.dataset import Dataset
from carclass.errors import UserError
from carclass.models import architectures
from carclass.models.classifier import Classifier
from carclass.runs.run import parse_parent
from carclass.training.pretrained import load_backbone

COLUMNS = ("key", "label", "split", "finding", "detail", "suggestion", "action")


class Audit(NamedTuple):
    """Results of an audit."""

    counts: dict[Kind, int]  # photos
    num_leaks: int  # photos with a near-duplicate in another split
    table: str  # URI
    page: str  # URI


def audit_uri(root: str, dataset_name: str) -> str:
    """Return the URI of the folder of a dataset's audit."""
    return storage.join(root, "audits", dataset_name)


def check_table(root: str, dataset_name: str, *, overwrite: bool) -> None:
    """Raise UserError for a table of a former audit, in which actions may have been entered."""
    uri = storage.join(audit_uri(root, dataset_name), "audit.csv")
    if not overwrite and storage.exists(uri):
        raise UserError(
            f"{uri} exists, and may hold actions that you have entered. Move it, or add --overwrite to replace it."
        )


def audit_dataset(root: str, source: Dataset, settings: TrainSettings) -> Audit:
    """Audit a dataset by the backbone of `train`, and write its table and page."""
    photos = read_photos(source, load_network(root, settings), settings)
    findings = find_all(photos)
    folder = audit_uri(root, source.name)
    table, page = storage.join(folder, "audit.csv"), storage.join(folder, "audit.html")
    storage.write_bytes(table, render_table(photos, findings).encode())
    storage.write_bytes(page, write_page(source, photos, findings).encode())
    num_leaks = len({each.photo for each in findings if each.is_leak})
    return Audit(count_kinds(findings), num_leaks, table, page)


def load_network(root: str, settings: TrainSettings) -> Classifier:
    """Return the backbone that a run of these settings starts from, on a GPU if this process has one.

    Raise UserError for a parent that is a run.
    """
    if parse_parent(settings.parent) is not None:
        raise UserError(
            f"`train.parent` is {settings.parent}, a run that has learned the labels, right and wrong ones. Use a "
            "config file that starts from `imagenet`, `pretrained` or a file of weights."
        )
    net = architectures.build(settings.model, 1)
    load_backbone(net, settings, storage.join(root, "weights"))
    return net.to(choose_device(settings.use_gpu is not False and torch.cuda.is_available()))


def render_table(photos: AuditedPhotos, findings: list[Finding]) -> str:
    """Return the findings as CSV: a row for each photo and finding, whose action is `keep` until it is edited."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in findings:
        label, split = photos.classes[photos.labels[each.photo]], photos.splits[each.photo]
        writer.writerow([photos.keys[each.photo], label, split, each.kind, each.detail, each.suggestion, "keep"])
    return text.getvalue()
