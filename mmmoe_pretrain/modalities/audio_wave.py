"""A waveform from a mel spectrogram, to listen to what a model generates: the inverse of audio.py's analysis up to
the phases, which a spectrogram lacks. They are found by Griffin and Lim's iterations ("Signal Estimation from
Modified Short-Time Fourier Transform", IEEE TASSP 1984).

Shapes: F frames, K bins of a spectrum, M mel bands.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

ITERATIONS = 60
UNMIXING = 60  # steps from bands to bins
EPS = 1e-12


def wave_of_mel(mel_MF: np.ndarray, filters_MK: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """float32 [samples]: whose energies in the bands are about ``mel_MF``, at any scale."""
    magnitude_FK = np.sqrt(_power(mel_MF.astype(np.float64), filters_MK.astype(np.float64))).T
    window = np.hanning(n_fft + 1)[:-1]
    phase_FK = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude_FK.shape))
    for _ in range(ITERATIONS):
        spectrum_FK = _analysed(_joined(magnitude_FK * phase_FK, window, hop), window, hop, len(phase_FK))
        phase_FK = spectrum_FK / np.maximum(np.abs(spectrum_FK), EPS)
    return _joined(magnitude_FK * phase_FK, window, hop).astype(np.float32)


def _power(mel_MF: np.ndarray, filters_MK: np.ndarray) -> np.ndarray:
    """[K, F]: not negative, with these energies in the bands, by multiplicative updates of the squared error (Lee and
    Seung, "Learning the parts of objects by non-negative matrix factorization", 1999)."""
    wanted_KF = filters_MK.T @ mel_MF
    power_KF, squares_KK = wanted_KF + EPS, filters_MK.T @ filters_MK
    for _ in range(UNMIXING):
        power_KF = power_KF * wanted_KF / np.maximum(squares_KK @ power_KF, EPS)
    return power_KF


def _joined(spectrum_FK: np.ndarray, window: np.ndarray, hop: int) -> np.ndarray:
    """The wave whose windows are nearest to those of the spectrum: their sum by overlap, divided by the windows',
    from the middle of the first to that of the last."""
    frames_FN = np.fft.irfft(spectrum_FK, n=len(window)) * window
    total = np.zeros(hop * (len(frames_FN) - 1) + len(window))
    weight = np.zeros_like(total)
    for i, frame in enumerate(frames_FN):
        total[i * hop : i * hop + len(window)] += frame
        weight[i * hop : i * hop + len(window)] += window**2
    half = len(window) // 2
    return (total / np.maximum(weight, 1e-8))[half : half + hop * (len(frames_FN) - 1) + 1]


def _analysed(wave: np.ndarray, window: np.ndarray, hop: int, frames: int) -> np.ndarray:
    """[F, K] around every hop, with silence before and behind, as audio.py analyses a clip."""
    half = len(window) // 2
    windows = sliding_window_view(np.pad(wave, (half, half + len(window))), len(window))
    return np.fft.rfft(windows[::hop][:frames] * window)
