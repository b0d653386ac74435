"What is left of `R*n` goes to the next batch, so that small batches drop as large a share as large ones."
import pytest, torch
from hypothesis import given, strategies as st
from fastai.vision.all import GradientAccumulation, partial
from fastai_jocor.all import CoTeachingCallback, JoCorCallback, jocor_mlp
from fastai_jocor.batch import Selection
from learners import Step, tensors

pytestmark = pytest.mark.filterwarnings('ignore:the peers have not learned')

@given(n=st.integers(1, 70), R=st.floats(0, .99), batches=st.integers(1, 200))
def test_the_remainder_is_carried(n, R, batches):
    "After any number of batches less than an item is owed, as far as one item of each may be dropped"
    s = Selection()
    counts = [s.drop_count(n, R) for _ in range(batches)]
    assert all(0 <= o <= n-1 for o in counts)
    want = min(R*n, n-1)*batches
    assert want-1-1e-3 < sum(counts) <= want+1e-3
    assert max(counts)-min(counts) <= 1

@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=100), R=st.floats(0, .5))
def test_batches_of_several_sizes(sizes, R):
    s = Selection()
    dropped = sum(s.drop_count(n, R) for n in sizes)
    assert R*sum(sizes)-1-1e-3 < dropped <= R*sum(sizes)+1e-3

def items(n=240):
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(n, 64, generator=g),torch.randint(0, 10, (n,), generator=g)
    return x,y

def dropped(bs, lr=1e-3, cbs=(), method=partial(JoCorCallback, rule='schedule'), **kwargs):
    "Items that the batches of an epoch drop, and how many they hold"
    counts = []
    def count(l):
        kept = l.selection.kept
        counts.append(l.selection.n-int(kept.sum() if kept.is_floating_point() else len(kept)))
    cb = method(k=2, num_gradual=0, **kwargs)
    learn = tensors(*items(), jocor_mlp(10, 64), bs=bs)
    learn.fit(1, lr, cbs=[cb, Step(count), *cbs])
    assert len(counts) == len(learn.dls.train) and 1-cb.history.kept[0] == pytest.approx(sum(counts)/240)
    return counts

@pytest.mark.parametrize('accumulate', (False,True))
@pytest.mark.parametrize('bs', range(1, 10))
def test_the_share_of_an_epoch(bs, accumulate):
    R = .37
    cbs = [GradientAccumulation(16)] if accumulate else []
    share = sum(dropped(bs, cbs=cbs, forget_rate=R))/240
    if bs == 1: assert share == 0 # one item of each batch is kept
    else: assert R-1/240-1e-6 < share <= R+1e-6

@pytest.mark.parametrize('bs', (2,3,7,8))
def test_the_share_of_an_epoch_in_co_teaching(bs):
    share = sum(dropped(bs, method=CoTeachingCallback, forget_rate=.37))/240
    assert .37-1/240-1e-6 < share <= .37+1e-6

@pytest.mark.parametrize('bs', (2,3,7,64))
def test_official_rounding_is_that_of_each_batch(bs):
    counts = dropped(bs, forget_rate=.37, rounding='official')
    assert set(counts[:-1]) == {bs-max(int(.63*bs), 1)}

@pytest.mark.parametrize('bs', (2,3,7))
def test_the_least_share_of_the_evidence_rule(bs):
    "Where there are votes against enough labels, as here, where the labels say nothing"
    cb,counts = JoCorCallback(k=2, without=('margin','protection','guess')),[]
    learn = tensors(*items(), jocor_mlp(10, 64), bs=bs)
    learn.fit(1, 0., cbs=cb)
    cb.evidence.brake = .2
    learn.fit(1, 0., cbs=[cb, Step(lambda l: counts.append(l.selection.n-int(l.selection.kept.sum())))])
    assert cb.history.R.tolist() == [0,.2]
    assert .2-.01 < sum(counts)/240 <= .2+1e-6 and max(counts) <= -(-bs//5)

@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=60), R=st.floats(0, .99))
def test_a_number_that_is_not_read(sizes, R):
    "Tensors, as of items with a label, give what numbers give; of a batch without any, nothing is dropped"
    read,unread = Selection(),Selection()
    for n in sizes:
        count = unread.drop_count(torch.tensor(n), R)
        assert count.dtype == torch.int64 and int(count) == (read.drop_count(n, R) if n else 0)
