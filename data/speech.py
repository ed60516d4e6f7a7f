"""Spoken digits: the recordings of the Free Spoken Digit Dataset in their published layout, or a few made-up tones.

Recordings are recordings/{digit}_{speaker}_{index}.wav, 8,000 samples a second, of 16 bits. The published split takes
the indices 0 to 4 of every speaker and digit for testing, the others for training.

Waveforms are brought to a peak of 1 when they are read: recordings differ in level by 40 dB, and noise is measured
below the peak of its utterance.
"""

from __future__ import annotations

import io
import re
import tempfile
import wave
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.mnist import DataError, DownloadError
from data.text import download

DATA_FOLDER = Path(__file__).resolve().parent / "fsdd"
HOME = "https://github.com/Jakobovski/free-spoken-digit-dataset"
ARCHIVE = f"{HOME}/archive/refs/tags/v1.0.10.zip"  # a folder with recordings/ in it; without a published checksum
ARCHIVE_SECONDS = 60.0  # for some 16 MB
LEAST_RECORDINGS = 2900  # of a download; 3,000 were published
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000
TEST_INDICES = 5
FILE = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
LARGEST = 2**15
TONES_EACH, TONES_TEST = 12, 4  # of every class of the made-up tones
MAX_SECONDS = 10.0


@dataclass(frozen=True)
class Utterance:
    """A waveform, (n,) float32 with a peak of 1, of a digit; ``peak`` is that of the file, a share of full scale."""

    samples: np.ndarray
    label: int
    name: str
    peak: float


@dataclass(frozen=True)
class SpeechData:
    """Utterances to train on and to test with; ``source`` is "fsdd" or "tones"."""

    source: str
    train: list[Utterance]
    test: list[Utterance]
    class_names: tuple[str, ...] = CLASS_NAMES
    name: str = "speech"


def load_speech(data_dir: str | Path | None = None, sample: bool = False) -> SpeechData:
    """The recordings of data_dir, or made-up tones if a ``sample`` is asked for.

    Without data_dir those of data/fsdd, else downloaded to there.

    Raises:
        DataError: there are no recordings, or one is damaged.
    """
    if sample:
        return made_up_tones()
    base = DATA_FOLDER if data_dir is None else Path(data_dir)
    for folder in (base / "fsdd" / "recordings", base / "recordings", base):
        if folder.is_dir() and any(FILE.fullmatch(path.name) for path in folder.glob("*.wav")):
            return read_recordings(folder)
    why = ""
    if data_dir is None:
        try:
            return read_recordings(download_speech(base))
        except DownloadError as error:
            why = f" ({error})"
    raise DataError(
        f"no recordings/0_george_0.wav or other digits in {base}{why}: clone {HOME} there, or take --sample"
    )


def download_speech(folder: Path) -> Path:
    """Download the recordings to folder/recordings, all of them or none; that folder.

    Raises:
        DownloadError: they cannot be had, or what came is not that archive.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(download(ARCHIVE, None, ARCHIVE_SECONDS))) as archive:
            inside = (Path(name) for name in archive.namelist())
            names = [path for path in inside if path.parent.name == "recordings" and FILE.fullmatch(path.name)]
            if len(names) < LEAST_RECORDINGS:
                raise DownloadError(f"what came from {ARCHIVE} has {len(names)} recordings, not 3,000")
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
                made = Path(temporary) / "recordings"
                made.mkdir()
                for path in names:
                    (made / path.name).write_bytes(archive.read(path.as_posix()))
                made.replace(folder / "recordings")
    except zipfile.BadZipFile as error:
        raise DownloadError(f"what came from {ARCHIVE} is no whole zip file") from error
    except OSError as error:
        raise DownloadError(f"{folder} cannot be written: {error.strerror}") from error
    print(f"downloaded {len(names)} recordings from {ARCHIVE} (its authors published no checksum to compare with)")
    return folder / "recordings"


def read_recordings(folder: Path) -> SpeechData:
    """All utterances of a folder, by the published split. Raises DataError if one is damaged or a part is empty."""
    train: list[Utterance] = []
    test: list[Utterance] = []
    matches = [(FILE.fullmatch(path.name), path) for path in folder.glob("*.wav")]
    for match, path in sorted((m for m in matches if m[0]), key=lambda m: (int(m[0][1]), m[0][2], int(m[0][3]))):
        samples = read_wav(path)
        part = test if int(match[3]) < TEST_INDICES else train
        part.append(_utterance(samples, int(match[1]), path.stem, path))
    for name, part in (("training", train), ("test", test)):
        if not part:
            raise DataError(f"{folder} holds no {name} utterances: indices 0 to {TEST_INDICES - 1} are for testing")
    return SpeechData("fsdd", train, test)


def read_wav(path: Path) -> np.ndarray:
    """Samples of a mono 16-bit file of 8,000 a second, (n,) float32 in [-1, 1). Raises DataError."""
    try:
        with wave.open(str(path), "rb") as file:
            kind = file.getnchannels(), file.getsampwidth(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged or no wav file: {error or 'it ends too early'}") from error
    if kind != (1, 2, RATE):
        found = f"{kind[0]} channel(s), {8 * kind[1]} bits, {kind[2]} a second"
        raise DataError(f"{path} must have one channel of 16 bits, {RATE} samples a second, not {found}")
    return np.frombuffer(raw[: len(raw) // 2 * 2], "<i2").astype(np.float32) / LARGEST


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write samples, (n,) in [-1, 1], as 16 bits; what lies outside is cut."""
    whole = np.clip(np.round(np.asarray(samples, dtype=np.float64) * LARGEST), -LARGEST, LARGEST - 1).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(whole.tobytes())


def _utterance(samples: np.ndarray, label: int, name: str, path: Path) -> Utterance:
    peak = float(np.abs(samples).max(initial=0.0))
    if peak == 0.0:
        raise DataError(f"{path} holds nothing but silence")
    if len(samples) > MAX_SECONDS * RATE:
        raise DataError(f"{path} is longer than {MAX_SECONDS:g} seconds")
    last = int(np.flatnonzero(samples)[-1]) + 1  # zeros at the end of a file cannot be told from padding
    return Utterance(samples[:last] / np.float32(peak), label, name, peak)


def made_up_tones(seed: int = 0) -> SpeechData:
    """Two tones a class, of random length and phase in a little noise: enough to try all scripts without data."""
    random = np.random.default_rng(seed)
    parts: tuple[list[Utterance], list[Utterance]] = ([], [])
    for index in range(TONES_EACH):
        for label in range(len(CLASS_NAMES)):
            time = np.arange(int(random.uniform(0.2, 0.4) * RATE)) / RATE
            tones = sum(
                np.sin(2 * np.pi * frequency * random.uniform(0.98, 1.02) * time + random.uniform(0, 2 * np.pi))
                for frequency in (250 + 60 * label, 1000 + 250 * ((3 * label) % 10))
            )
            samples = (tones * np.hanning(len(time)) + 0.02 * random.standard_normal(len(time))).astype(np.float32)
            name = f"{label}_tones_{index}"
            parts[index < TONES_TEST].append(_utterance(0.2 * samples, label, name, Path(name)))
    return SpeechData("tones", *parts)


def as_chunks(utterances: Sequence[Utterance], hop: int) -> tuple[Tensor, Tensor]:
    """Waveforms cut into chunks of ``hop`` samples, (N, C, hop) float32, padded with zeros; and their lengths, (N,).

    An utterance has two chunks at least, of which a window can be made.
    """
    lengths = [max(2, -(-len(one.samples) // hop)) for one in utterances]
    x = torch.zeros(len(utterances), max(lengths), hop)
    for row, one in zip(x, utterances, strict=True):
        row.view(-1)[: len(one.samples)] = torch.from_numpy(one.samples)
    return x, torch.tensor(lengths)


def chunk_lengths(x: Tensor) -> Tensor:
    """The lengths of ``as_chunks`` again, (N,): up to the last chunk with a sample that is not 0, two at least."""
    loud = (x != 0).any(dim=-1)
    places = torch.arange(1, x.shape[1] + 1, device=x.device)
    return (loud * places).amax(dim=1).clamp(min=min(2, x.shape[1]))
