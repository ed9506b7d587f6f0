from __future__ import annotations

import json

from mmmoe_pretrain.data_prep.verify import Seen, verify_folder
from tests.support import write_tar


def test_verify_notes_samples_of_one_split_that_are_in_another_whatever_their_keys(tmp_path):
    document = json.dumps({"parts": [{"text": "one"}, {"member": "0.png"}]}).encode()
    write_tar(tmp_path / "train/0.tar", [("a.png", b"x"), ("a.txt", b"red"), ("b.png", b"y"), ("c.txt", b"blue")])
    write_tar(tmp_path / "train/1.tar", [("d.0.png", b"z"), ("d.json", document), ("e.txt", b"only here")])
    write_tar(tmp_path / "validation/0.tar", [("f.png", b"x"), ("f.json", b'{"caption": " Red!"}'), ("g.txt", b"x")])
    write_tar(
        tmp_path / "test/0.tar", [("h.png", b"x"), ("h.txt", b"rouge"), ("i.0.png", b"z"), ("i.json", document)]
    )
    write_tar(tmp_path / "test/1.tar", [("j.png", b"x"), ("j.txt", b"red")])
    seen = Seen()
    assert list(verify_folder(tmp_path, seen)) == []
    notes = [note for note in seen.notes() if "dedup" in note]
    train, val, test = (f"in {tmp_path / name}" for name in ("train", "validation", "test"))
    more = "mmmoe-data dedup finds all"
    assert notes == [
        f"1 sample of val is in train, too, such as f {val}/0.tar, which is a {train}/0.tar; {more}",
        f"2 samples of test are in train, too, such as i {test}/0.tar, which is d {train}/1.tar; {more}",
        f"1 sample of test is in val, too, such as j {test}/1.tar, which is f {val}/0.tar; {more}",
    ]
    alone = Seen()
    assert list(verify_folder(tmp_path / "train", alone)) == []
    assert not alone.leaks.wanted
