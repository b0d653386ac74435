"Selection that leaves no class out: against a loop in float64, on digits whose classes are lost without it, and when things go wrong."
import copy, numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from fastai.vision.all import BCEWithLogitsLossFlat, Callback, DataLoader, DataLoaders, Learner
from fastai_jocor.all import *
from learners import digits, digits64, quiet, Record

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31-1), st.integers(1, 40), st.integers(1, 6), st.floats(0, 1))
def test_quantiles_are_numpys(seed, n, c, q):
    rng = np.random.default_rng(seed)
    loss,targ = rng.choice([rng.random(), np.nan, np.inf, *rng.random(8)], n),rng.integers(-1, c, n)
    got = class_quantiles(torch.as_tensor(loss), torch.as_tensor(targ), c, q)
    for i in range(c):
        own = np.sort(loss[(targ == i) & np.isfinite(loss)])
        assert got[i] == (own[int(q*(len(own)-1))] if len(own) else 0)

def test_same_weights_as_a_loop():
    "The quantiles of an epoch are those of the losses that the epoch before saw"
    learn,rec,behind = digits64(),Record(),[]
    nets = [jocor_mlp(10,64).double() for _ in range(3)]
    twins = copy.deepcopy(nets)
    class See(Callback):
        order,run_valid = 20,False
        def before_train(self): behind.append(self.jo_cor.behind)
    learn.fit(4, 1e-3, cbs=[JoCorCallback(k=3, models=nets, co_lambda=.8, forget_rate=.5, num_gradual=1, balance=.7), rec, See()])
    opt = torch.optim.Adam([p for m in twins for p in m.parameters()], lr=1e-3)
    q,seen,was,wants = None,[],0,[]
    def quantiles():
        loss,targ = (np.concatenate(o) for o in zip(*seen))
        return np.array([np.sort(loss[targ == c])[int(.25*((targ == c).sum()-1))] for c in range(10)])
    for epoch,x,y in rec.batches:
        if epoch != was: q,seen,was = quantiles(),[],epoch; wants.append(q)
        zs = [m(x) for m in twins]
        ce = sum(F.cross_entropy(z, y, reduction='none') for z in zs)
        kl = sum(F.kl_div(F.log_softmax(zs[n],-1), F.log_softmax(zs[m],-1), log_target=True, reduction='none').sum(-1) for m in range(3) for n in range(3) if m != n)
        loss = .2*ce + .8*kl/2
        own = loss.detach().numpy()
        seen.append((own.astype(np.float32), y.numpy()))
        kept = np.argsort(own if q is None else own - np.float32(.7)*q[y.numpy()].astype(np.float32))[:int((1-(.5 if epoch else 0.))*len(y))]
        opt.zero_grad(); loss[torch.as_tensor(kept)].mean().backward(); opt.step()
    assert behind[0] is None and len(wants) == 3
    for got,want in zip(behind[1:], wants): np.testing.assert_allclose(got, .7*want, rtol=1e-5)
    for m,t in zip(learn.model.peers, twins):
        for a,b in zip(m.parameters(), t.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

def test_no_class_is_lost():
    "Digits, 80% of the labels wrong, three seeds: the class of which least is kept, and accuracy"
    def least(balance, seed):
        learn,cb = digits(Symmetric(.8), seed),JoCorCallback(k=3, balance=balance, seed=seed)
        learn.fit_one_cycle(40, 2e-2, cbs=cb)
        f = cb.ledger
        return f[f.true == f.given].groupby('true').kept.mean().min(), learn.recorder.values[-1][2]
    without,balanced = [np.mean([least(b, s) for s in range(3)], 0) for b in (0.,.5)]
    assert balanced[0] > without[0]+.05 and balanced[1] > without[1]+.05

def test_off_is_off_and_a_second_fit_goes_on():
    seen = []
    class See(Callback):
        order,run_valid = 20,False
        def before_train(self): seen.append(self.jo_cor.behind)
    learn,cb = digits(),JoCorCallback(k=2, balance=.5)
    learn.fit(1, 1e-3, cbs=[cb,See()])
    learn.fit(1, 1e-3, cbs=[cb,See()])
    learn.fit(1, 1e-3, cbs=[JoCorCallback(k=2),See()])
    assert seen[0] is None and seen[1].shape == (10,) and (seen[1] > 0).all() and seen[2] is None

@pytest.mark.parametrize('prune', ('exact','approx'))
def test_with_pruning(prune):
    "`exact` selects what the whole batch would, `approx` by the losses of earlier epochs less the same quantiles"
    chosen = []
    class See(Callback):
        order,run_valid = 20,False
        def before_batch(self):
            cb = self.jo_cor
            if prune == 'approx' and cb.selection.pruned is not None:
                last,given = (o[cb.selection.idx] for o in (cb.items.last_loss, cb.items.given_label))
                new = last.isnan()
                small = [set(select_small(o.masked_fill(new, -1e9), .6).tolist()) for o in (last-cb.behind[given.clamp(min=0)], last)]
                assert set(cb.selection.pruned.tolist()) == small[0]
                chosen.append(small[0] != small[1])
    weights = []
    for p in (None,prune):
        torch.manual_seed(0)
        learn = digits() if prune == 'approx' else digits64()
        torch.manual_seed(1); learn.dls.train.rng.seed(1)
        learn.fit(4, 1e-3, cbs=[JoCorCallback(k=2, forget_rate=.6, num_gradual=1, balance=.5, prune=p, refresh=2, seed=1), See()])
        weights.append([o.detach().clone() for o in learn.model.parameters()])
    if prune == 'exact':
        for a,b in zip(*weights): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    else: assert len(chosen) > 10 and any(chosen)

@pytest.mark.parametrize('balance', (-.1, 1.5, 'much', True, float('nan')))
def test_refused(balance):
    with pytest.raises(ValueError, match=r'balance=.* must lie in \[0, 1\]'): JoCorCallback(balance=balance)

def test_refused_learners():
    x,y = torch.rand(64, 64),torch.randint(0, 2, (64,3)).float()
    several = quiet(Learner(DataLoaders(DataLoader(list(zip(x,y)), bs=16), DataLoader(list(zip(x,y)), bs=16)), jocor_mlp(3, 64), loss_func=BCEWithLogitsLossFlat()))
    silent = quiet(Learner(DataLoaders(*[torch.utils.data.DataLoader(list(zip(x,y[:,0].long())), 16) for _ in range(2)]), jocor_mlp(2, 64), loss_func=torch.nn.CrossEntropyLoss()))
    for learn in (several,silent):
        model = learn.model
        with pytest.raises(ValueError, match='balance=0.5 compares'): learn.fit(1, cbs=JoCorCallback(forget_rate=.2, balance=.5))
        assert learn.model is model
        learn.fit(1, cbs=JoCorCallback(forget_rate=.2))
