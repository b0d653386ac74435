"Selection that leaves no class out: against a loop, and on digits whose classes are lost without it."
import copy, pytest, torch
import numpy as np
from hypothesis import given, settings, strategies as st
from fastai.vision.all import BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoaders, Learner
from fastai_jocor.all import *
from fastai_jocor.selection import class_quantiles, select_small
from learners import Record, digits, digits64, mlps64, quiet, tensors, weights
import reference

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31-1), st.integers(1, 40), st.integers(1, 6), st.floats(0, 1))
def test_quantiles_are_numpys(seed, n, c, q):
    rng = np.random.default_rng(seed)
    loss,targ = rng.choice([rng.random(), np.nan, np.inf, *rng.random(8)], n),rng.integers(-1, c, n)
    got = class_quantiles(torch.as_tensor(loss), torch.as_tensor(targ), c, q)
    for i in range(c):
        own = np.sort(loss[(targ == i) & np.isfinite(loss)])
        assert got[i] == (own[int(q*(len(own)-1))] if len(own) else 0)

class Behind(Callback):
    "How far the classes are behind in each epoch"
    order,run_valid = 20,False
    def __init__(self, cb): self.cb,self.found = cb,[]
    def before_train(self): self.found.append(None if self.cb.behind is None else self.cb.behind.clone())

def quantiles(seen):
    "For each class the loss below which a quarter of its items lies, from pairs of losses and labels"
    loss,targ = (np.concatenate(o) for o in zip(*seen))
    return np.array([np.sort(loss[targ == c])[int(.25*((targ == c).sum()-1))] for c in range(10)])

def balanced_loop(nets, batches, balance=.7):
    "Train by the losses less the quantiles of the epoch before, which are kept in float32; gives the quantiles"
    opt,q,seen,found,was = reference.adam(nets, 1e-3),None,[],[],0
    for epoch,x,y in batches:
        if epoch != was:
            q,seen,was = quantiles(seen),[],epoch
            found.append(q)
        loss = reference.joint_losses([m(x) for m in nets], y)
        own = loss.detach().numpy()
        seen.append((own.astype(np.float32), y.numpy()))
        by = own if q is None else own - np.float32(balance)*q[y.numpy()].astype(np.float32)
        kept = reference.smallest(torch.as_tensor(by), .5 if epoch else 0.)
        reference.step(opt, loss[kept].mean())
    return found

def test_same_weights_as_a_loop():
    "The quantiles of an epoch are those of the losses that the epoch before saw"
    learn,rec,nets = digits64(),Record(),mlps64(3)
    twins = copy.deepcopy(nets)
    cb = JoCorCallback(k=3, models=nets, co_lambda=.8, forget_rate=.5, num_gradual=1, balance=.7, rounding='official')
    see = Behind(cb)
    learn.fit(4, 1e-3, cbs=[cb, rec, see])
    wants = balanced_loop(twins, rec.batches)
    assert see.found[0] is None and len(wants) == 3
    for got,want in zip(see.found[1:], wants): np.testing.assert_allclose(got, .7*want, rtol=1e-5)
    reference.assert_same_weights(learn.model.peers, twins, atol=1e-6)

def kept_of_the_least_class(balance, seed):
    "Share in which the right labels of the worst class were kept, and the accuracy; 80% of the labels are wrong"
    learn,cb = digits(Symmetric(.8), seed),JoCorCallback(k=3, balance=balance, seed=seed, rule='schedule')
    learn.fit_one_cycle(40, 2e-2, cbs=cb)
    true,right = learn.dls.noise.true,~learn.dls.noise.flipped
    kept = cb.items.frame().kept.to_numpy()
    return min(kept[right & (true == c)].mean() for c in range(10)), learn.recorder.values[-1][2]

def test_no_class_is_lost():
    without,balanced = [np.mean([kept_of_the_least_class(b, s) for s in range(3)], 0) for b in (0.,.5)]
    assert balanced[0] > without[0]+.05 and balanced[1] > without[1]

def test_off_is_off_and_a_second_fit_goes_on():
    learn,cb,off = digits(),JoCorCallback(k=2, balance=.5),JoCorCallback(k=2, rule='schedule')
    on,other = Behind(cb),Behind(off)
    for _ in range(2): learn.fit(1, 1e-3, cbs=[cb, on])
    learn.fit(1, 1e-3, cbs=[off, other])
    assert on.found[0] is None and on.found[1].shape == (10,) and (on.found[1] > 0).all() and other.found == [None]

def test_with_exact_pruning():
    "Selects what the whole batch would"
    found = []
    for prune in (None,'exact'):
        learn = digits64()
        cb = JoCorCallback(k=2, forget_rate=.6, num_gradual=1, balance=.5, prune=prune, seed=1)
        learn.fit(4, 1e-3, cbs=cb)
        found.append(weights(learn.model))
    for a,b in zip(*found): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

class PrunedByQuantiles(Callback):
    "The places that are left are those of the smallest last losses less the quantiles"
    order,run_valid = 20,False
    def __init__(self, cb): self.cb,self.differ = cb,[]
    def before_batch(self):
        s,cb = self.learn.selection,self.cb
        if s.pruned is None: return
        last,label = cb.items.last_loss[s.idx],torch.as_tensor(self.dls.noise.noisy)[s.idx]
        small = lambda by: set(select_small(by.masked_fill(last.isnan(), -1e9), .6).tolist())
        balanced = small(last-cb.behind[label])
        assert set(s.pruned.tolist()) == balanced
        self.differ.append(balanced != small(last))

def test_with_approximate_pruning():
    "By the losses of earlier epochs less the same quantiles"
    cb = JoCorCallback(k=2, forget_rate=.6, num_gradual=1, balance=.5, prune='approx', refresh=2, seed=1,
        rounding='official')
    see = PrunedByQuantiles(cb)
    digits().fit(4, 1e-3, cbs=[cb, see])
    assert len(see.differ) > 10 and any(see.differ)

@pytest.mark.parametrize('balance', (-.1, 1.5, 'much', True, float('nan')))
def test_refused(balance):
    with pytest.raises(ValueError, match=r'balance=.* must lie in \[0, 1\]'): JoCorCallback(balance=balance)

def several_labels():
    y = torch.randint(0, 2, (64,3)).float()
    return tensors(torch.rand(64,64), y, jocor_mlp(3, 64), 16, BCEWithLogitsLossFlat())

def silent_loader():
    items = list(zip(torch.rand(64,64), torch.randint(0, 2, (64,))))
    dl = torch.utils.data.DataLoader(items, 16)
    return quiet(Learner(DataLoaders(dl, dl), jocor_mlp(2, 64), loss_func=CrossEntropyLossFlat()))

@pytest.mark.parametrize('make', (several_labels, silent_loader))
def test_refused_learners(make):
    learn = make()
    model = learn.model
    with pytest.raises(ValueError, match='balance=0.5 compares'):
        learn.fit(1, cbs=JoCorCallback(forget_rate=.2, balance=.5))
    assert learn.model is model
    learn.fit(1, cbs=JoCorCallback(forget_rate=.2))
