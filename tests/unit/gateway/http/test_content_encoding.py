"""Compressed bodies: what comes out, and what never does."""

import gzip

import pytest
from backports import zstd

from services.gateway.http.content_encoding import decode
from services.gateway.http.errors import ApiError

BODY = b'{"prompt": "Say it"}' * 40


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("", BODY),
        ("identity", BODY),
        ("gzip", gzip.compress(BODY)),
        (" GZIP ", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY)),
        ("zstd", zstd.compress(BODY)),
    ],
    ids=["none", "identity", "gzip", "spelt otherwise", "x-gzip", "zstd"],
)
def test_a_body_comes_out_as_it_went_in(encoding: str, body: bytes) -> None:
    assert decode(body, encoding, max_bytes=len(BODY)) == BODY


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, zstd", "compress"])
def test_other_encodings_are_refused_by_name(encoding: str) -> None:
    with pytest.raises(ApiError, match=encoding) as caught:
        decode(BODY, encoding, max_bytes=1000)
    assert caught.value.status == 415
    assert caught.value.headers["accept-encoding"] == "gzip, zstd"


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_bomb_is_refused_before_it_is_whole(encoding: str) -> None:
    bomb = gzip.compress(bytes(10**8)) if encoding == "gzip" else zstd.compress(bytes(10**8))
    assert len(bomb) < 2 * 10**5
    with pytest.raises(ApiError, match="1000 bytes") as caught:
        decode(bomb, encoding, max_bytes=1000)
    assert caught.value.status == 413


def test_a_decoder_that_would_need_much_memory_is_not_made() -> None:
    options = {
        zstd.CompressionParameter.window_log: 27,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    compressor = zstd.ZstdCompressor(options=options)
    wide = compressor.compress(bytes(10**6)) + compressor.flush()
    with pytest.raises(ApiError, match="not valid zstd") as caught:
        decode(wide, "zstd", max_bytes=10**7)
    assert caught.value.status == 400


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@pytest.mark.parametrize("fault", ["no such thing", "cut", "more behind"])
def test_what_is_not_as_announced_is_refused(encoding: str, fault: str) -> None:
    good = gzip.compress(BODY) if encoding == "gzip" else zstd.compress(BODY)
    body = {"no such thing": BODY, "cut": good[:-5], "more behind": good + b"x"}[fault]
    with pytest.raises(ApiError, match=f"not valid {encoding}") as caught:
        decode(body, encoding, max_bytes=10_000)
    assert caught.value.status == 400
