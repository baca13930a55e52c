"""Commands of a Markdown page, which tests/cluster/test_runbook.py runs."""

from tests.helpers.runbook import Command, read_blocks, read_spans

PAGE = """
Run `ray up build/aws.yaml` or `ray job stop`, see `docs/cluster.md`, and `docker
pull an/image`.

```sh
export TOKEN=secret
python submit.py --env A=s3://b/c -- \\
    python jobs/pipeline.py    # follows it
until ray dashboard x; do
    sleep 5
done
```

```yaml
key: `ray exec no/command`
```

```sh
aws ec2 describe-instances
```
"""


def test_commands_of_blocks_are_whole_and_have_the_settings_before_them():
    assert read_blocks(PAGE) == [
        Command("python submit.py --env A=s3://b/c -- \\\n    python jobs/pipeline.py    # follows it", SETTINGS),
        Command("until ray dashboard x; do\n    sleep 5\ndone", SETTINGS),
        Command("aws ec2 describe-instances"),
    ]


SETTINGS = "export TOKEN=secret\n"


def test_commands_of_the_text_are_those_with_an_argument():
    assert read_spans(PAGE) == [Command("ray up build/aws.yaml"), Command("docker pull an/image")]
