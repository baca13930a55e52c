"""Command line of prepare_aws.py."""

import argparse
import math
import re

from aws_images import GPU_AMI

from carclass.config import cli
from carclass.errors import UserError

NEEDED = ("subnet", "photos", "root", "image")
"""Options without which a cluster cannot be prepared; it is removed without them."""
DIGEST = re.compile("sha256:[0-9a-f]{64}")
EMAIL = re.compile(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+")
PRINCIPAL = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:(user|role)/[\w+=,.@/-]+")


def parse_options(doc: str) -> argparse.Namespace:
    """Parse the command line. doc: text of --help. Raise UserError for values that cannot be right."""
    parser = _make_parser(doc)
    options = parser.parse()
    if not options.remove:
        if missing := [f"--{name}" for name in NEEDED if not getattr(options, name)]:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
        _check_image_name(options.image)
        _check_addresses(options)
    return options


def _make_parser(doc: str) -> cli.JobParser:
    """Return the parser of all options; those with several values have a list as default."""
    parser = cli.JobParser(doc)
    parser.add_argument("--region", required=True)
    parser.add_argument(
        "--subnet", action="append", default=[], help="private subnet of the nodes; several: the head is in the first"
    )
    parser.add_argument("--photos", help="s3:// prefix that jobs read")
    parser.add_argument("--root", help="s3:// prefix that jobs read and write")
    parser.add_argument("--image", help="image of the Dockerfile, by digest: …@sha256:…")
    parser.add_argument(
        "--ami",
        help="Ubuntu with Docker: ami-…, or an SSM parameter; by default that of an existing build/aws.yaml of this "
        f"region, or else {GPU_AMI}",
    )
    parser.add_argument(
        "--operator",
        action="append",
        default=[],
        help="ARN of a user (with MFA) or role that may be operator; by default the former ones, at first you",
    )
    parser.add_argument("--budget", type=float, help="dollars a month, at whose shares of 50, 80 and 100 %% AWS writes")
    parser.add_argument("--email", help="address for --budget")
    parser.add_argument("--tls", action="store_true", help="encrypt Ray's traffic between nodes")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="give the roles other --photos or --root than before, to which running nodes then lose access",
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="delete everything created by this script except the token; other options than --region have no effect",
    )
    return parser


def _check_image_name(image: str) -> None:
    """Raise UserError for an image without a registry or a whole digest."""
    name, sign, digest = image.partition("@")
    if not sign:
        raise UserError(f"--image {image} has no digest, so its content could change. Give …@sha256:….")
    if not DIGEST.fullmatch(digest):
        raise UserError(
            f"--image {image}: a digest is sha256: and 64 hexadecimal digits. Copy the one that `docker push` printed."
        )
    registry, slash, repository = name.partition("/")
    if not slash or not repository or not ("." in registry or ":" in registry):
        raise UserError(
            f"--image {image} names no registry. Give it too, such as "
            f"123456789012.dkr.ecr.us-east-1.amazonaws.com/carclass@sha256:…, or docker.io/{name}@sha256:…."
        )


def _check_addresses(options: argparse.Namespace) -> None:
    """Raise UserError for a budget, an e-mail address or an operator that AWS would not take."""
    if (options.budget is None) != (options.email is None):
        raise UserError("give --budget and --email together.")
    if options.budget is not None and not (math.isfinite(options.budget) and options.budget > 0):
        raise UserError(f"--budget {options.budget:g}: give dollars a month, more than 0.")
    if options.email is not None and not EMAIL.fullmatch(options.email):
        raise UserError(f"--email {options.email} is no address. Give one such as you@example.com.")
    for arn in options.operator:
        if not PRINCIPAL.fullmatch(arn):
            raise UserError(
                f"--operator {arn} is no ARN of a user or role. Give one such as arn:aws:iam::123456789012:user/you."
            )
