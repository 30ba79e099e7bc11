"""Speech by espeak-ng, called through ctypes, and its FLAC encoding."""

from __future__ import annotations

import ctypes
import io
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mmrep.errors import DataError

ESPEAK_RATE, RATE = 22_050, 16_000  # Hz
UP, DOWN = 320, 441
# CLDR language -> espeak-ng's voice, where they differ.
VOICE_OF = {"en": "en-us", "zh": "cmn", "pt": "pt-br", "no": "nb"}

# espeak-ng's speak_lib.h
SYNCHRONOUS, DONT_EXIT, UTF8, BY_CHARACTER = 2, 0x8000, 1, 1
PARAMETER_RATE, PARAMETER_VOLUME, PARAMETER_PITCH, PARAMETER_RANGE, PARAMETER_WORDGAP = 1, 2, 3, 4, 7
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class Speaker:
    """espeak-ng in this process.

    The library is one global state that a clip leaves changed: the same words twice give slightly different samples. The
    same clips in the same order in a fresh process give the same bytes, so make one Speaker in a process forked for it.

    Args:
        seed: Starts espeak-ng's noise generator.
    """

    def __init__(self, seed: int) -> None:
        import espeakng_loader

        self._chunks: list[bytes] = []
        self._callback = CALLBACK(self._take)  # kept: the library holds only a pointer
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
        if self._library.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), DONT_EXIT) != ESPEAK_RATE:
            raise DataError("espeak-ng does not start", where=data, fix="pip install --force-reinstall espeakng-loader")
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def say(self, text: str, language: str, voice: str, rate: int, pitch: int) -> NDArray[np.int16]:
        """Samples [n] at 22,050 Hz; rate in words/min, pitch from 0 to 99."""
        name = f"{VOICE_OF.get(language, language)}+{voice}"
        if self._library.espeak_SetVoiceByName(name.encode()):
            raise DataError(f"espeak-ng has no voice {name}")
        values = {PARAMETER_RATE: rate, PARAMETER_PITCH: pitch}
        defaults = {PARAMETER_VOLUME: 100, PARAMETER_RANGE: 50, PARAMETER_WORDGAP: 0}
        for parameter, value in (values | defaults).items():
            self._library.espeak_SetParameter(parameter, value, 0)
        return self._synthesise(text.encode())

    def _synthesise(self, text: bytes) -> NDArray[np.int16]:
        self._chunks.clear()
        size, zero = ctypes.c_size_t(len(text) + 1), ctypes.c_uint(0)
        self._library.espeak_Synth(text, size, zero, BY_CHARACTER, zero, ctypes.c_uint(UTF8), None, None)
        self._library.espeak_Synchronize()
        return np.frombuffer(b"".join(self._chunks), dtype=np.int16)

    def _take(self, samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0


def resample(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    """[n] at 22,050 Hz -> [ceil(n * 320 / 441)] at 16 kHz."""
    from scipy.signal import resample_poly

    slower = resample_poly(samples.astype(np.float64), UP, DOWN, window=_low_pass())
    clipped: NDArray[np.int16] = np.clip(np.rint(slower), -32_768, 32_767).astype(np.int16)
    return clipped


@cache
def _low_pass() -> NDArray[np.float64]:
    """resample_poly's own filter, made once instead of once per clip."""
    from scipy.signal import firwin

    taps: NDArray[np.float64] = firwin(20 * DOWN + 1, 1 / DOWN, window=("kaiser", 5.0))
    return taps


def encode_flac(samples: NDArray[np.int16]) -> bytes:
    """16-bit mono FLAC at 16 kHz."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()
