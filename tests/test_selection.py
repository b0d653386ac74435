import math, numpy as np, pytest, torch
from hypothesis import given, strategies as st
from fastai_jocor.selection import default_num_gradual, forget_schedule, keep_count, precision_and_recall, select_small

losses = st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=200)
rates = st.floats(0, .999)

@given(l=losses, r=rates)
def test_select_small(l, r):
    t = torch.tensor(l, dtype=torch.float32)
    idx = select_small(t, r)
    finite = [i for i,v in enumerate(l) if math.isfinite(v)]
    assert len(idx) == max(int((1-r)*len(l)), 1)
    if not finite: return
    assert set(idx.tolist()) <= set(finite)
    want = np.sort(np.array(l, dtype=np.float32)[finite])[:len(idx)]
    np.testing.assert_array_equal(np.sort(t[idx.unique()].cpu().numpy()), want)
    counts = torch.bincount(idx)[idx.unique()]
    assert counts.max() - counts.min() <= 1

@given(n=st.integers(1,300), r=rates, seed=st.integers(0,99))
def test_equals_a_sort_where_all_losses_are_finite(n, r, seed):
    t = torch.tensor(np.random.RandomState(seed).permutation(n), dtype=torch.float32)
    assert t[select_small(t, r)].tolist() == list(range(keep_count(n, r)))
    assert select_small(t, r, finite=True).tolist() == select_small(t, r).tolist()

def test_floor_as_in_the_official_code():
    assert [keep_count(10,.8), keep_count(37,.8), keep_count(128,.5), keep_count(3,.9)] == [1,7,64,1]

def test_selection_is_detached():
    l = torch.randn(5, requires_grad=True)
    assert not select_small(l, .2).requires_grad

def test_no_host_synchronisation():
    from torch.utils._python_dispatch import TorchDispatchMode
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            assert f not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), f
            return f(*args, **(kwargs or {}))
    with NoSync():
        with pytest.raises(AssertionError): torch.ones(1).item()
        select_small(torch.tensor([1.,float('nan'),2.]), .5)

@given(tau=st.floats(0,.99), n=st.integers(1,60), g=st.none()|st.integers(0,40), c=st.floats(.2,3))
def test_schedule(tau, n, g, c):
    r = forget_schedule(tau, n, g, c)
    gradual = min(10, n//2) if g is None else g
    assert r.shape == (n,) and ((0 <= r) & (r < 1)).all()
    assert (r[gradual:] == tau).all()
    assert (np.diff(r[:gradual]) >= 0).all() and (gradual==0 or r[0]==0)
    if g is None: assert r[-1] == tau

@given(n=st.integers(1,50), seed=st.integers(0,99), r=rates)
def test_precision_and_recall(n, seed, r):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    loss,clean = torch.rand(n, generator=g),torch.rand(n, generator=g)<.6
    kept = select_small(loss, r)
    precision,recall = precision_and_recall(torch.zeros(n).index_fill(0, kept, 1), clean)
    k,s = set(kept.tolist()),{i for i in range(n) if clean[i]}
    assert precision == pytest.approx(len(k&s)/len(k))
    if s: assert recall == pytest.approx(len(k&s)/len(s))

@pytest.mark.parametrize('r', (-.1, 1., 1.5, float('nan')))
def test_bad_rate(r):
    with pytest.raises(ValueError, match='R='): select_small(torch.rand(4), r)
    with pytest.raises(ValueError, match='tau='): forget_schedule(r, 10)

@given(n=st.integers(1,300), b=st.integers(1,10_000))
def test_default_rise(n, b):
    g = default_num_gradual(n, b)
    assert g <= n//2 and (g == n//2 or g >= 10 and (g-1)*b < max(3900, 10*b) and g*b >= 3900)
    assert default_num_gradual(n) == min(10, n//2)
