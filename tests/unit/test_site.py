"""The site file: what it may say, and what is said of one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from llara_dist.cluster.site import Container, Site, parse_site, read_site
from llara_dist.errors import InputError

WHOLE = """
partition: gpu
account: project-7
sbatch: [--exclusive, "--comment=a b"]
srun: [--mpi=none]
setup: [module load cuda, 'source "$HOME/my env/bin/activate"']
environment: {NCCL_DEBUG: WARN, NCCL_IB_TIMEOUT: 22}
container: {command: [apptainer, exec, --nv, /data/image.sif]}
python: /opt/python
gpus: gres
"""


def test_every_field_is_read_and_written_again() -> None:
    site = parse_site(WHOLE, "site.yaml")
    assert site.sbatch == ("--exclusive", "--comment=a b")
    assert site.environment == {"NCCL_DEBUG": "WARN", "NCCL_IB_TIMEOUT": "22"}
    assert site.container == Container(command=("apptainer", "exec", "--nv", "/data/image.sif"))
    assert parse_site(site.to_yaml(), "again") == site


def test_a_missing_default_file_means_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLARA_DIST_SITE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_site() == Site()
    file = tmp_path / ".config" / "llara-dist" / "site.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("partition: gpu\n")
    assert read_site() == Site(partition="gpu")


def test_a_file_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLARA_DIST_SITE", str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match=r"none\.yaml: not found \(LLARA_DIST_SITE names it\)"):
        read_site()
    with pytest.raises(InputError, match=r"other\.yaml: not found; expected a site file"):
        read_site(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitions: gpu", "unknown field partitions; known are partition, account"),
        ("container: {images: x}", "unknown field container.images; known are command, image, mounts"),
        ("container: {command: [a], image: b}", "two ways of the same"),
        ("container: {mounts: [a]}", "container.mounts needs container.image"),
        ("setup: module load cuda", "setup must be a list of texts"),
        ("environment: {DEBUG: true}", "environment.DEBUG must be text, found True; put it in quotes"),
        ("environment: {A-B: x}", "no name of a variable"),
        ("environment: {NO: 1}", "environment: False is no name of a variable; put it in quotes"),
        ("gpus: 8", "gpus must be one of gpus-per-node, gres, none"),
        ("[partition]", "the file must be a mapping"),
        ("partition: [", "not YAML"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_site(text, "site.yaml")
    assert str(caught.value).startswith("site.yaml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_example_is_a_site_file_as_it_stands_and_with_its_comments_taken_off() -> None:
    path = Path(__file__).parents[2] / "launch" / "site.example.yaml"
    assert read_site(path).setup == ("module load cuda",)
    text = path.read_text()
    for name in ("qos", "constraint", "python"):
        text = text.replace(f"# {name}:", f"{name}:")
    text = text.replace("# container:", "container:").replace("#   command:", "  command:")
    whole = parse_site(text, "example")
    assert whole.container.command[0] == "apptainer"
    assert whole.constraint == "h100"
