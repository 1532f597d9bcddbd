"""Random attention problems for the tests: tensors with odd strides, lengths and pages, and what they must give."""

from dataclasses import dataclass

import torch
from accuracy import assert_as_accurate, pytorch_attend_one

from aiter import reference


def strided(shape, dtype, how, generator=None):
    """A tensor of `shape` whose memory is laid out as `how` says: every one has a unit stride in the last dimension
    but 'last', which must be copied."""
    if how == "contiguous":
        return torch.randn(shape, dtype=torch.float32, generator=generator).to(dtype)
    if how == "heads_first":
        order = list(range(len(shape)))
        order[-3], order[-2] = order[-2], order[-3]
        return strided([shape[i] for i in order], dtype, "contiguous", generator).transpose(-3, -2)
    if how == "sliced":
        wide = strided([*shape[:-1], shape[-1] + 3], dtype, "contiguous", generator)
        return wide[..., 1 : shape[-1] + 1]
    if how == "last":
        return strided([*shape[:-2], shape[-1], shape[-2]], dtype, "contiguous", generator).transpose(-1, -2)
    raise ValueError(how)


STRIDES = ("contiguous", "heads_first", "sliced", "last")


@dataclass
class Sequence:
    """One sequence of a batch: its rows of the arguments and where its rows of the results are."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rows: tuple
    lse_rows: tuple


def assert_sequences(output, lse, sequences, causal, softmax_scale=None):
    """Holds each sequence's rows of output and log-sum-exp against float64, by the rule for accuracy. Errors are taken
    over the whole batch, as the rule compares two operators and not two rows."""
    references, pytorch = [], []
    for sequence in sequences:
        tensors = sequence.query, sequence.key, sequence.value
        expected, expected_lse = reference.attend_one(*tensors, causal, softmax_scale)
        references.append(expected.flatten())
        pytorch.append(pytorch_attend_one(*tensors, causal, softmax_scale).to(output.dtype).flatten())
        if lse is not None:
            torch.testing.assert_close(lse[sequence.lse_rows].double(), expected_lse, rtol=1e-4, atol=2e-4)
    if references:
        got = torch.cat([output[sequence.rows].flatten() for sequence in sequences])
        assert_as_accurate(got, torch.cat(references), torch.cat(pytorch))
