"""Recordings in the published layout, made-up tones, and waveforms in chunks."""

from __future__ import annotations

import io
import wave
import zipfile

import numpy as np
import pytest
import torch

from data import speech
from data.mnist import DataError, DownloadError
from data.speech import as_chunks, chunk_lengths, load_speech, made_up_tones, read_wav, write_wav


def recordings(folder, names=("0_theo_0", "7_theo_4", "7_theo_5", "3_lucas_17")):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        write_wav(folder / f"{name}.wav", 0.3 * np.sin(np.arange(900 + 100 * number) / 9))
    return folder


@pytest.mark.parametrize("inside", ["recordings", "fsdd/recordings", "."])
def test_the_published_layout_and_split(tmp_path, inside):
    folder = recordings(tmp_path / "base" / inside if inside != "." else tmp_path / "base")
    (folder / "notes.txt").write_text("no recording")
    data = load_speech(tmp_path / "base")
    assert data.source == "fsdd"
    assert [(one.name, one.label) for one in data.test] == [("0_theo_0", 0), ("7_theo_4", 7)]
    assert [(one.name, one.label) for one in data.train] == [("3_lucas_17", 3), ("7_theo_5", 7)]
    for one in (*data.train, *data.test):
        assert np.abs(one.samples).max() == 1.0 and one.samples.dtype == np.float32
        assert one.peak == pytest.approx(0.3, abs=1e-3)


def test_samples_are_read_as_they_were_written(tmp_path):
    samples = np.array([0.0, 0.5, -1.0, 1.0, 0.25, 2.0])
    write_wav(tmp_path / "a.wav", samples)
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav")[:3], samples[:3].astype(np.float32))
    assert read_wav(tmp_path / "a.wav")[3:].tolist() == [1 - 2**-15, 0.25, 1 - 2**-15]


@pytest.mark.parametrize(
    "content, message",
    [(b"", "damaged or no wav file"), (b"RIFFxxxxWAVEjunk", "damaged or no wav file"), (b"plain text", "no wav file")],
)
def test_damaged_files_are_named(tmp_path, content, message):
    folder = recordings(tmp_path / "recordings")
    (folder / "5_theo_1.wav").write_bytes(content)
    with pytest.raises(DataError, match=f"5_theo_1.wav is {message}|{message}") as caught:
        load_speech(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_formats_silence_and_missing_parts(tmp_path):
    folder = recordings(tmp_path / "recordings")
    with wave.open(str(folder / "5_theo_1.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(1)
        file.setframerate(16000)
        file.writeframes(bytes(40))
    with pytest.raises(DataError, match="one channel of 16 bits, 8000 samples a second, not 2 channel"):
        load_speech(tmp_path)
    write_wav(folder / "5_theo_1.wav", np.zeros(500))
    with pytest.raises(DataError, match="nothing but silence"):
        load_speech(tmp_path)
    with pytest.raises(DataError, match="holds no training utterances"):
        load_speech(recordings(tmp_path / "part", ("0_theo_0",)))
    with pytest.raises(DataError, match="no recordings/0_george_0.wav"):
        load_speech(tmp_path / "nowhere")


def test_chunks_and_their_lengths():
    utterances = made_up_tones().test[:6]
    x, lengths = as_chunks(utterances, 200)
    assert x.shape == (6, int(lengths.max()), 200)
    for row, one, length in zip(x, utterances, lengths.tolist(), strict=True):
        assert length == max(2, -(-len(one.samples) // 200))
        np.testing.assert_array_equal(row.flatten()[: len(one.samples)].numpy(), one.samples)
        assert not row.flatten()[len(one.samples) :].any()
    assert torch.equal(chunk_lengths(x), lengths)


def test_tones_are_the_same_every_time_and_of_all_classes():
    data, again = made_up_tones(), made_up_tones()
    assert {one.label for one in data.test} == {one.label for one in data.train} == set(range(10))
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(data.train, again.train, strict=True))


def archive_of(folder, inside="free-spoken-digit-dataset-1.0.10/recordings"):
    """The published layout as a zip file in bytes, with a file of another kind and one of a name that leads out."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(folder.glob("*.wav")):
            archive.write(path, f"{inside}/{path.name}")
        archive.writestr("free-spoken-digit-dataset-1.0.10/README.md", "text")
        archive.writestr("../recordings/evil.wav", "")
    return content.getvalue()


def test_recordings_are_downloaded_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    good = archive_of(recordings(tmp_path / "published"))
    home = tmp_path / "fsdd"
    monkeypatch.setattr(speech, "DATA_FOLDER", home)
    monkeypatch.setattr(speech, "LEAST_RECORDINGS", 4)
    few = archive_of(recordings(tmp_path / "few", ("0_theo_0",)))
    for content, message in ((good[:-40], "no whole zip file"), (b"<html>", "no whole zip"), (few, "has 1 recordings")):
        monkeypatch.setattr(speech, "download", lambda *_, content=content: content)
        with pytest.raises(DataError, match=message) as caught:
            load_speech()
        assert "take --sample" in str(caught.value) and not home.exists()
    addresses = []
    monkeypatch.setattr(speech, "download", lambda url, *_: addresses.append(url) or good)
    data = load_speech()
    assert addresses == [speech.ARCHIVE] and addresses[0].startswith("https://github.com/Jakobovski/")
    assert len(data.train) == len(data.test) == 2 and "downloaded 4 recordings" in capsys.readouterr().out
    assert sorted(path.name for path in home.iterdir()) == ["recordings"]
    monkeypatch.setattr(speech, "download", lambda *_: pytest.fail("they are there"))
    assert load_speech().source == "fsdd"


def test_without_a_network_the_line_says_what_to_do(tmp_path, monkeypatch):
    def nothing(*_):
        raise DownloadError("no network to download them")

    monkeypatch.setattr(speech, "DATA_FOLDER", tmp_path / "fsdd")
    monkeypatch.setattr(speech, "download", nothing)
    with pytest.raises(DataError, match=r"\(no network to download them\): clone .* there, or take --sample"):
        load_speech()
    with pytest.raises(DataError, match="other digits in .*nowhere: clone"):
        load_speech(tmp_path / "nowhere")  # is not downloaded to
