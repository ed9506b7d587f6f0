"""The package managers' clients, replaced by scripts that answer like them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from mmmoe_pretrain.data_prep.corpora import packages
from mmmoe_pretrain.data_prep.corpora.download import MissingFileError, Remote, file_digest


def fake_client(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def clients(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_a_missing_client_names_itself_and_mini(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm is not installed.*corpus mini"):
        packages.fetch_npm("thing", "1.0.0", tmp_path)
    with pytest.raises(ValueError, match=r"dpkg-deb is not installed.*corpus mini"):
        packages.fetch_debian("thing", tmp_path)


def test_package_lists_are_fetched_privately_where_apt_has_none(tmp_path: Path, clients: Path):
    digest = "0" * 64
    line = f"'http://h/p/x_1%3a2-3_all.deb' x_1%3a2-3_all.deb 10 SHA256:{digest}"
    fake_client(
        clients,
        "apt-get",
        f"""
        case "$*" in
          *Dir::State=*update) touch {tmp_path}/updated ;;
          *Dir::State=*download*) [ -e {tmp_path}/updated ] && echo "{line}" ;;
          *) echo "E: Unable to locate package x" >&2; exit 100 ;;
        esac""",
    )
    found = packages._locate_debian("x", tmp_path / "state")
    assert (found.name, found.size, found.digest) == ("x_1%3a2-3_all.deb", 10, digest)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_either_hash_that_apt_names_is_checked(tmp_path: Path, clients: Path, algorithm: str):
    digest = hashlib.new(algorithm, b"hi").hexdigest()
    fake_client(clients, "apt-get", f"""echo "'http://h/x_1_all.deb' x_1_all.deb 2 {algorithm.upper()}:{digest}\"""")
    found = packages._locate_debian("x", tmp_path)
    assert (found.algorithm, found.digest, found.size) == (algorithm, digest, 2)
    (tmp_path / "hi").write_bytes(b"hi")
    assert file_digest(tmp_path / "hi", found.algorithm) == digest


def test_stale_package_lists_are_refreshed_once(tmp_path: Path, clients: Path, monkeypatch):
    fake_client(
        clients,
        "apt-get",
        f"""
        case "$*" in
          *Dir::State=*update) touch {tmp_path}/updated ;;
          *Dir::State=*download*) echo "'http://h/x_2_all.deb' x_2_all.deb 2 SHA256:{"2" * 64}" ;;
          *) echo "'http://h/x_1_all.deb' x_1_all.deb 2 SHA256:{"1" * 64}" ;;
        esac""",
    )
    fake_client(clients, "dpkg-deb", 'touch "$3/unpacked"')
    asked = []

    def old_version_is_missing(remote: Remote, folder: Path) -> Path:
        asked.append(remote.name)
        if remote.name == "x_1_all.deb":
            raise MissingFileError("x_1_all.deb: the server answers 404 Not Found")
        return folder / remote.name

    monkeypatch.setattr(packages, "download", old_version_is_missing)
    folder, version = packages.fetch_debian("x", tmp_path)
    assert (asked, version) == (["x_1_all.deb", "x_2_all.deb"], "2")
    assert (folder / "unpacked").is_file()
    assert (tmp_path / "updated").is_file()


def test_an_unknown_package_reports_what_apt_says(tmp_path: Path, clients: Path):
    fake_client(clients, "apt-get", "echo 'E: Unable to locate package x' >&2; exit 100")
    with pytest.raises(ValueError, match=r"knows no package x \(E: Unable to locate package x\)"):
        packages._locate_debian("x", tmp_path / "state")


def test_lists_of_translations_are_fetched_privately_in_the_languages_asked_for(tmp_path: Path, clients: Path):
    """Here apt's configuration is ours: it lists the languages that it was told, once they were fetched."""
    fake_client(
        clients,
        "apt-get",
        r"""
        case "$*" in *Dir::State=*" -c "*) ;; *) exit 1 ;; esac
        while [ "$1" != -c ]; do shift; done
        case "$*" in
          *update) cp "$2" "$2.used" ;;
          *indextargets*) for name in pt_BR de; do
              grep -q "\"$name\";" "$2.used" && printf '%s\tbookworm\t/lists/%s\n' $name $name; done ;;
        esac""",
    )
    found = packages.fetch_translations(("pt_BR", "xx"), tmp_path)
    assert found == [packages.Translations("pt_BR", "bookworm", Path("/lists/pt_BR"))]
    [config] = tmp_path.rglob("apt.conf")
    assert config.read_text().splitlines()[0] == "#clear Acquire::Languages;"
    fake_client(clients, "apt-get", "echo 'W: no connection' >&2")
    with pytest.raises(ValueError, match=r"no descriptions of packages \(W: no connection\)"):
        packages.fetch_translations(("de",), tmp_path)


def npm_package(folder: Path, member: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(member)
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    (folder / "thing.tgz").write_bytes(buffer.getvalue())
    return buffer.getvalue()


def answer(folder: Path, content: bytes) -> str:
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    return json.dumps({"dist.tarball": (folder / "thing.tgz").as_uri(), "dist.integrity": integrity})


def test_an_npm_package_is_checked_and_unpacked(tmp_path: Path, clients: Path):
    content = npm_package(tmp_path, "package/a.txt")
    fake_client(clients, "npm", f"echo '{answer(tmp_path, content)}'")
    folder = packages.fetch_npm("@scope/thing", "1.0.0", tmp_path / "work")
    assert (folder / "a.txt").read_text() == "hi"


def test_an_error_of_npm_is_passed_on(tmp_path: Path, clients: Path):
    fake_client(clients, "npm", """echo '{"error": {"summary": "connection refused"}}'; exit 1""")
    with pytest.raises(ValueError, match=r"thing@1\.0\.0 \(connection refused\).*corpus mini"):
        packages.fetch_npm("thing", "1.0.0", tmp_path)


def test_a_package_that_reaches_outside_is_refused_by_name(tmp_path: Path, clients: Path):
    content = npm_package(tmp_path, "../../evil.txt")
    fake_client(clients, "npm", f"echo '{answer(tmp_path, content)}'")
    with pytest.raises(ValueError, match=r"thing-1\.0\.0\.tgz cannot be unpacked"):
        packages.fetch_npm("thing", "1.0.0", tmp_path / "work")
    assert not list(tmp_path.rglob("evil.txt"))


def unpack(target: Path, *members: tuple[str, bytes, str]) -> None:
    """Pack (name, type, link), owned by a foreign user and setuid, and unpack into ``target``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.linkname, info.uid = kind, 0o6666, link, 12345
            info.size = 2 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"hi"))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        packages.unpack_tar(tar, target)


def test_unpacked_files_and_folders_are_ours(tmp_path: Path):
    unpack(tmp_path, ("a", tarfile.DIRTYPE, ""), ("a/b.txt", tarfile.REGTYPE, ""), ("c/d.txt", tarfile.REGTYPE, ""))
    (tmp_path / "plain").touch()
    for name in ("a/b.txt", "c/d.txt"):
        found, plain = (tmp_path / name).stat(), (tmp_path / "plain").stat()
        assert (tmp_path / name).read_bytes() == b"hi"
        assert (found.st_uid, found.st_mode) == (plain.st_uid, plain.st_mode)


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../evil", tarfile.REGTYPE, ""),
        ("a/../../evil", tarfile.REGTYPE, ""),
        ("{root}/evil", tarfile.REGTYPE, ""),
        ("evil", tarfile.SYMTYPE, "/etc/passwd"),
        ("evil", tarfile.SYMTYPE, "../outside"),
        ("evil", tarfile.LNKTYPE, "../outside"),
        ("evil", tarfile.CHRTYPE, ""),
        ("evil", tarfile.FIFOTYPE, ""),
    ],
)
def test_a_member_that_reaches_outside_is_refused_by_name(tmp_path: Path, name: str, kind: bytes, link: str):
    target = tmp_path / "in" / "target"
    target.mkdir(parents=True)
    with pytest.raises(ValueError, match="evil"):
        unpack(target, (name.format(root=tmp_path), kind, link))
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.network
@pytest.mark.timeout(300)
def test_a_real_debian_package_arrives(tmp_path: Path):
    folder, version = packages.fetch_debian("asterisk-core-sounds-en", tmp_path)
    assert (folder / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").is_file()
    assert version
