"""Seeds of replicas: what each would draw alone, and drawn again where a forward runs again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from petune_kernels.ops import _seeds
from petune_kernels.ops.dropout import dropout

CPU = torch.device("cpu")


def alone(seed: int, count: int) -> list[int]:
    torch.manual_seed(seed)
    with _seeds.replicated(None):
        return [int(_seeds.new_seed(CPU)) for _ in range(count)]


def test_each_replica_draws_what_it_would_alone_and_torchs_generator_stays() -> None:
    sources = _seeds.Sources([3, 4, 3])
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with _seeds.replicated(sources):
        drawn = torch.stack([_seeds.new_seed(CPU), _seeds.new_seed(CPU, 3), _seeds.new_seed(CPU)])
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.T.tolist() == [alone(3, 3), alone(4, 3), alone(3, 3)]
    assert _seeds.new_seed(CPU).shape == (1,), "outside, torch's own generator again"


def test_several_at_once_are_those_drawn_one_by_one() -> None:
    torch.manual_seed(3)
    assert [int(seed) for seed in _seeds.new_seeds(3, CPU)] == alone(3, 3)
    torch.manual_seed(3)
    assert torch.cat(list(_seeds.new_seeds(3, CPU, 2))).tolist() == alone(3, 6)
    with _seeds.replicated(_seeds.Sources([3, 4])):
        found = [seed.tolist() for seed in _seeds.new_seeds(3, CPU, 2)]
    assert found == [list(pair) for pair in zip(alone(3, 3), alone(4, 3), strict=True)]


def test_seeding_again_leaving_and_coming_back() -> None:
    sources = _seeds.Sources([3, 4, 5])
    with _seeds.replicated(sources):
        _seeds.new_seed(CPU)
        sources.manual_seed(2, 8)
        sources.active.remove(0)
        assert len(sources) == 2
        assert _seeds.new_seed(CPU).tolist() == [alone(4, 2)[1], alone(8, 1)[0]]
        sources.active.append(0)
        assert _seeds.new_seed(CPU).tolist() == [alone(4, 3)[2], alone(8, 2)[1], alone(3, 2)[1]]
        sources.active.remove(0)
    with _seeds.replicated(sources), pytest.raises(ValueError, match="3 replicas of a parameter in a packed run of 2"):
        _seeds.new_seed(CPU, 3)


@pytest.mark.parametrize("replicas", (None, (3, 4)))
def test_rewound_draws_the_same_again_even_outside(replicas: tuple[int, ...] | None) -> None:
    """As recomputation in backward does: the packed forward is over, and nothing of it may be drawn from."""
    sources = None if replicas is None else _seeds.Sources(replicas)
    x = torch.ones(4, 64)

    def two() -> Tensor:
        return torch.stack([dropout(x, 0.5), dropout(x, 0.5)])

    with _seeds.replicated(sources):
        dropout(x, 0.5)
        state = _seeds.state(CPU)
        first = two()
        later = dropout(x, 0.5)
        for_later = _seeds.state(CPU)
    global_before = torch.get_rng_state()
    with _seeds.rewound(CPU, state):
        assert torch.equal(two(), first) and torch.equal(dropout(x, 0.5), later)
    assert torch.equal(torch.get_rng_state(), global_before)
    with _seeds.rewound(CPU, for_later):
        following = dropout(x, 0.5)
    with _seeds.replicated(sources):
        assert torch.equal(dropout(x, 0.5), following), "afterwards every generator stands where it stood before"


def test_rewound_to_before_the_first_draw() -> None:
    sources = _seeds.Sources([3, 4])
    with _seeds.replicated(sources):
        state = _seeds.state(CPU)
        first = _seeds.new_seed(CPU)
        with _seeds.rewound(CPU, state):
            assert torch.equal(_seeds.new_seed(CPU), first)
        assert _seeds.new_seed(CPU).tolist() == [alone(3, 2)[1], alone(4, 2)[1]]


def test_another_thread_draws_for_itself_until_it_is_given_the_sources() -> None:
    """Beside a packed run another model may run; what backward runs again in another thread is the packed run's."""
    with ThreadPoolExecutor(1) as other:
        with _seeds.replicated(_seeds.Sources([3, 4])):
            state = _seeds.state(CPU)
            first = _seeds.new_seed(CPU)
            assert not other.submit(_seeds.packed).result()
            assert other.submit(_seeds.new_seed, CPU).result().shape == (1,)

        def again() -> torch.Tensor:
            with _seeds.rewound(CPU, state):
                return _seeds.new_seed(CPU)

        assert torch.equal(other.submit(again).result(), first)
