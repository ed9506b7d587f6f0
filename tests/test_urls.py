"""URLs: what grants access is hidden in messages and refused in what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.urls import filled_in, has_secret, join, redacted, redacted_command, secret_option
from tests.support import tiny_config


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a.tar", "https://***@host/a.tar"),
        ("cannot read https://ghp_1234@host/a.tar: 403", "cannot read https://***@host/a.tar: 403"),
        (
            "s3://b/a.tar?X-Amz-Date=1&X-Amz-Signature=ab12&part=3",
            "s3://b/a.tar?X-Amz-Date=1&X-Amz-Signature=***&part=3",
        ),
        ("X https://h/a?AWSAccessKeyId=AK&Expires=5, Y", "X https://h/a?AWSAccessKeyId=***&Expires=5, Y"),
        ("https://h/a?sv=2&sig=x%2By&se=3 (503)", "https://h/a?sv=2&sig=***&se=3 (503)"),
        ("https://h/a?access_token=abc", "https://h/a?access_token=***"),
        ("abfs://container@account.host/a.tar?version=3", "abfs://container@account.host/a.tar?version=3"),
        ("data/a@b/c.tar", "data/a@b/c.tar"),
    ],
)
def test_messages_show_a_url_without_what_grants_access(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert has_secret(text) == ("***" in shown)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("pipe:curl -H 'Authorization: Bearer abc' https://h/a.tar", "pipe:curl -H 'Authorization: Bearer ***' https://h/a.tar"),
        ("pipe:curl -u me:abc https://h/a", "pipe:curl -u *** https://h/a"),
        ("pipe:curl --user=me:abc https://u:abc@h/a", "pipe:curl --user=*** https://***@h/a"),
        ("pipe:AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b -", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b -"),
        ("pipe:curl -H \"Authorization: Bearer $TOKEN\" h", "pipe:curl -H \"Authorization: Bearer $TOKEN\" h"),
        ("pipe:cat a.tar", "pipe:cat a.tar"),
    ],
)  # fmt: skip
def test_commands_are_shown_without_secrets(text: str, wanted: str) -> None:
    assert redacted_command(text) == wanted


def test_variables_are_filled_in_where_a_url_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIG", "ab12")
    assert filled_in("https://h/a.tar?sig=${SIG}") == "https://h/a.tar?sig=ab12"
    assert not has_secret("https://${ME}:${PW}@h/a.tar?sig=${SIG}")
    with pytest.raises(ValueError, match="the environment variable ABSENT is not set"):
        filled_in("s3://$ABSENT/a.tar")


def test_a_name_is_joined_before_the_signature_of_its_folder() -> None:
    assert join("https://h/train/?sig=1", "a.tar") == "https://h/train/a.tar?sig=1"
    assert join("s3://b/train/", "a.tar") == join("s3://b/train", "a.tar") == "s3://b/train/a.tar"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"s3": {"key": "AK"}}, "s3.key"),
        ({"s3": {"client_kwargs": {"aws_secret_access_key": "x"}}}, "s3.client_kwargs.aws_secret_access_key"),
        ({"abfs": {"sas_token": "x"}}, "abfs.sas_token"),
        ({"s3": {"endpoint_url": "https://me:pw@host"}}, "s3.endpoint_url"),
        ({"https": {"headers": {"Authorization": "Bearer x"}}}, "https.headers.Authorization"),
        ({"https": {"headers": {"Authorization": "Bearer ${TOKEN}"}}}, None),
        ({"s3": {"anon": True, "profile": "team", "endpoint_url": "http://host:1"}, "gs": {"token": "anon"}}, None),
    ],
)
def test_options_with_a_secret_are_found(options: dict, name: str | None) -> None:
    assert secret_option(options) == name


def test_a_config_keeps_the_names_of_secrets_and_refuses_the_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDS_URL", "https://h/a.tar?sig=ab12")
    raw = tiny_config(tmp_path).model_dump(mode="json")
    command = 'pipe:curl -H "Authorization: Bearer $TOKEN" https://h/a.tar'  # its shell fills it in
    for path in ("$SHARDS_URL", "https://h/a.tar?sig=${SIG}", "s3://b/train", command):
        raw["data"]["train"] = [{"path": path}]
        run_config.dump(run_config.parse(raw), tmp_path / "config.yaml")
        assert "ab12" not in (tmp_path / "config.yaml").read_text()
        assert run_config.load(tmp_path / "config.yaml").data.train[0].path == path
    for key, value in (
        ("train", [{"path": "https://h/a.tar?sig=ab12"}]),
        ("train", [{"path": "pipe:curl -u me:ab12 https://h/a.tar"}]),
        ("tokenizer", "$SHARDS_URL"),
        ("storage_options", {"s3": {"secret": "ab12"}}),
        ("storage_options", {"s3": "ab12"}),
    ):
        with pytest.raises(ValueError, match=f"data.{key}") as caught:
            run_config.parse({**raw, "data": {**raw["data"], key: value}})
        assert "ab12" not in str(caught.value)
    (tmp_path / "run.yaml").write_text("name: x")
    with pytest.raises(ValueError, match=r"run\.yaml with") as caught:
        run_config.load(tmp_path / "run.yaml", ["data.train=[{path: 'pipe:curl -u me:ab12 https://h/a.tar'}]"])
    assert "ab12" not in str(caught.value)
