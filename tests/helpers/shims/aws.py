"""aws: the AWS CLI's commands by the API's own model, with JSON and shorthand arguments, --query and text output."""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import boto3
import jmespath
from botocore import xform_name
from botocore.exceptions import ClientError
from botocore.model import ListShape, Shape, StructureShape

GLOBAL = ("region", "query", "output", "profile")


def main() -> int:
    words, options = sys.argv[1:], {}
    service, operation = words[:2]
    for word in words[2:]:
        if word.startswith("--"):
            options[word[2:]] = values = []
        else:
            values.append(word)
    settings = {name: options.pop(name)[0] for name in GLOBAL if name in options}
    session = boto3.Session(region_name=settings.get("region"), profile_name=settings.get("profile"))
    client = session.client(service)
    if (service, operation) == ("ecr", "get-login-password"):
        token = client.get_authorization_token()["authorizationData"][0]["authorizationToken"]
        print(base64.b64decode(token).decode().partition(":")[2])
        return 0
    method = next(name for name in client.meta.method_to_api_mapping if xform_name(name) == operation.replace("-", "_"))
    shape = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[method]).input_shape
    try:
        answer = getattr(client, method)(**parse_options(options, shape))
    except ClientError as error:
        print(f"\nAn error occurred {error}", file=sys.stderr)
        return 254
    answer.pop("ResponseMetadata", None)
    show(jmespath.search(settings["query"], answer) if "query" in settings else answer, settings.get("output", "json"))
    return 0


def parse_options(options: dict[str, list[str]], shape: StructureShape) -> dict[str, Any]:
    """Return the arguments of an operation. Raise KeyError for an option that it does not have."""
    members = {xform_name(name, "-"): name for name in shape.members}
    arguments: dict[str, Any] = {}
    for name, values in options.items():
        if name not in members and name.startswith("no-"):
            arguments[members[name[3:]]] = False
        else:
            arguments[members[name]] = parse(values, shape.members[members[name]])
    return arguments


def parse(values: list[str], shape: Shape) -> Any:
    """Return the value of an option from its words."""
    if not values:
        return True
    if values[0].startswith("file://"):
        values = [Path(values[0][7:]).read_text()]
    if isinstance(shape, StructureShape | ListShape) and values[0].lstrip().startswith(("[", "{")):
        return json.loads(values[0])
    if isinstance(shape, ListShape):
        return [parse([value], shape.member) for value in values]
    if isinstance(shape, StructureShape):
        return parse_shorthand(values[0], shape)
    convert = {"integer": int, "long": int, "boolean": lambda text: text == "true", "float": float, "double": float}
    return convert.get(shape.type_name, str)(values[0])


def parse_shorthand(text: str, shape: StructureShape) -> dict[str, Any]:
    """Return a structure from NAME=VALUE,NAME=VALUE,VALUE ...; further values belong to the name before."""
    groups: list[list[str]] = []
    for part in text.split(","):
        name, sign, value = part.partition("=")
        if sign:
            groups.append([name, value])
        else:
            groups[-1].append(part)
    return {name: parse(values, shape.members[name]) for name, *values in groups}


def show(answer: Any, output: str) -> None:
    """Print an answer as JSON, or its values separated by tabs."""
    if output == "text":
        rows = answer if isinstance(answer, list) else [answer]
        print("\t".join("None" if row is None else str(row) for row in rows))
    else:
        print(json.dumps(answer, indent=4, default=str))


if __name__ == "__main__":
    sys.exit(main())
