"""The packed bits and the memory order that every backend shares."""

import torch

from pyxai_bounds import ops
from pyxai_bounds.ops.layout import dense, memory_format, order_of, pack, state_size, unpack


def test_bits_are_packed_from_the_least_significant_in_two_planes():
    lower = torch.tensor([True, False, False, True, False, False, False, False, True])
    upper = torch.tensor([False] * 8 + [True])
    assert pack(lower, upper).tolist() == [[0b00001001, 1], [0, 1]]


def test_padding_bits_are_zero():
    for n in range(1, 20):
        packed = pack(torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool))
        assert packed.shape == state_size(torch.empty(n))
        assert [sum(byte.bit_count() for byte in plane) for plane in packed.tolist()] == [n, n]


def test_bits_follow_the_memory_order_of_a_channels_last_tensor():
    mask = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    mask[0, 2, 0, 0] = True
    assert pack(mask, mask)[0].tolist() == [0, 1]  # element 8 of 12
    last = mask.contiguous(memory_format=torch.channels_last)
    assert pack(last, last)[0].squeeze(-1).tolist() == [1 << 2, 0]  # element 2 of 12


def test_bits_bring_tensors_into_their_own_order(backend):
    """A kernel may return another memory order than the one that the bits were packed in."""
    torch.manual_seed(0)
    grad, rad, x = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    orders = (torch.contiguous_format, torch.channels_last)
    with ops.backend(backend):
        expected = None
        for bits_order in orders:
            state = ops.interval_relu(x.contiguous(memory_format=bits_order), 0.5 * rad)[2]
            assert order_of(state) is bits_order
            for order in orders:
                out = ops.interval_relu_backward(grad.contiguous(memory_format=order), rad, state)
                again = ops.interval_gate(grad.contiguous(memory_format=order), rad, out[2])
                expected = out if expected is None else expected
                assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
                assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])


def test_unpack_inverts_pack():
    torch.manual_seed(0)
    for shape in [(0,), (1,), (9,), (3, 5), (2, 3, 4, 5), (1, 1, 1, 1), (2, 7, 1, 3)]:
        for order in (torch.contiguous_format, torch.channels_last):
            if order is torch.channels_last and len(shape) != 4:
                continue
            like = torch.randn(shape).contiguous(memory_format=order)
            lower, upper = like > 0, like < 0.5
            again = unpack(pack(lower, upper), like)
            assert torch.equal(again[0], lower) and torch.equal(again[1], upper)


def test_memory_format_is_channels_last_only_where_it_differs_from_contiguous():
    last = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert memory_format(last) is torch.channels_last
    assert memory_format(last.contiguous()) is torch.contiguous_format
    one_channel = torch.empty(2, 1, 4, 5).contiguous(memory_format=torch.channels_last)
    assert memory_format(one_channel) is torch.contiguous_format
    assert memory_format(last[:, :, ::2]) is torch.contiguous_format  # neither: will be made contiguous


def test_dense_follows_the_first_tensor():
    first = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    other = torch.randn(2, 3, 4, 5)
    result = dense(first, other)[1]
    assert result.is_contiguous(memory_format=torch.channels_last) and torch.equal(result, other)
