"""Bodies that were compressed on their way: decoded within a bound, so that none can fill memory."""

import sys
import zlib
from collections.abc import Callable
from typing import Protocol

from services.gateway.http.errors import ApiError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_MAX_WINDOW_LOG = 23
"""8 MiB: what a zstd decoder must be able to remember (RFC 8878), and may at most."""


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _gzip() -> _Decoder:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _zstd() -> _Decoder:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})


_DECODERS: dict[str, Callable[[], _Decoder]] = {"gzip": _gzip, "x-gzip": _gzip, "zstd": _zstd}


def decode(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """The body as it was before `Content-Encoding: <encoding>`.

    Raises ApiError: 415 for an encoding that is not known here, 413 when more than `max_bytes` come
    out, 400 when the body is not what its encoding says.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _DECODERS:
        raise ApiError(415, f"the content encoding {encoding!r} is not supported: use gzip, zstd, or none")
    decoder = _DECODERS[name]()
    try:
        decoded = decoder.decompress(body, max_bytes + 1)
    except (zlib.error, zstd.ZstdError) as error:
        raise ApiError(400, f"the body is not valid {name}: {error}") from error
    if len(decoded) > max_bytes:
        raise ApiError(413, f"the decoded body is larger than {max_bytes} bytes")
    if not decoder.eof or decoder.unused_data:
        raise ApiError(400, f"the body is not valid {name}: it ends early, or goes on after its end")
    return decoded
