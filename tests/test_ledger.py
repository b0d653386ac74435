"The ledger against a slow reference, and the estimate of the noise rate that is made from it."
import math, warnings, numpy as np, pandas as pd, pytest, torch
from fastai.callback.data import WeightedDL
from fastai.vision.all import (Callback, CrossEntropyLossFlat, DataLoaders, Datasets, GradientAccumulation, Learner,
                               TfmdDL, accuracy, nn, set_seed)
from hypothesis import given, strategies as st
from fastai_jocor.all import *
from fastai_jocor.batch import Selection
from fastai_jocor.lab.run import fast_adam
from fastai_jocor.ledger import NoiseEstimate, confident_joint, estimate_noise, transition_of
from fastai_jocor.losses import joint_loss
from fastai_jocor.record import Sightings
from fastai_jocor.selection import forget_schedule
from learners import quiet

def digits(noise=Symmetric(.3)):
    set_seed(0)
    return quiet(Learner(digits_dls(noise=noise, bs=32), jocor_mlp(10, 64), opt_func=fast_adam, metrics=accuracy))

# the ledger, against a record of everything that was seen, item by item in float64

class Slow(Callback):
    "Keep every sighting; which item it is stands in its first number"
    order,run_valid = -4.9,False
    def __init__(self, n): self.n,self.seen = n,{i: [] for i in range(n)}
    def after_pred(self):
        self.logits = (self.pred[0] if isinstance(self.pred, tuple) else self.pred).detach().clone()

    def after_loss(self):
        z,y = self.logits.as_subclass(torch.Tensor).double(),self.yb[0].as_subclass(torch.Tensor)
        losses,p = joint_loss(z, y, self.learn.jo_cor.lam),z.softmax(-1).mean(0)
        n_kept = max(int((1-self.learn.jo_cor.R)*len(y)), 1)
        keep = set(sorted(range(len(y)), key=lambda j: losses[j].item())[:n_kept])
        if self.learn.jo_cor.by_evidence: keep = set(self.learn.selection.kept.nonzero()[:,0].tolist())
        for j,i in enumerate((self.xb[0][:,0]*1024).round().long().tolist()):
            votes = [int(z[m,j].argmax()) for m in range(len(z))]
            self.seen[i].append(dict(
                loss=losses[j].item(), prob=p[j,y[j]].item(), conf=p[j].max().item(),
                predicted_label=int(p[j].argmax()), given_label=int(y[j]), agree=len(set(votes)) == 1, kept=j in keep))

    def row(self, seen):
        cand,lead,recent = -1,0,math.nan
        for o in seen:
            recent = o['loss'] if recent != recent else .3*recent + .7*o['loss']
            if lead == 0: cand = o['predicted_label']
            lead += 1 if cand == o['predicted_label'] else -1
        mean = lambda f: math.fsum(f(o) for o in seen)/len(seen) if seen else math.nan
        last = seen[-1] if seen else dict(loss=math.nan, given_label=-1)
        return dict(
            seen=len(seen), kept=mean(lambda o: o['kept']), last_loss=last['loss'], recent_loss=recent,
            given_label=last['given_label'], predicted_label=cand, loss=mean(lambda o: o['loss']),
            prob=mean(lambda o: o['prob']), conf=mean(lambda o: o['conf']),
            votes_given=mean(lambda o: o['predicted_label'] == o['given_label']),
            agreement=mean(lambda o: o['agree']))

    def frame(self): return pd.DataFrame([self.row(self.seen[i]) for i in range(self.n)])

N = 203
def _x(i): return torch.cat([torch.tensor([i/1024.]), torch.randn(7, generator=torch.Generator().manual_seed(i))])
def _y(i): return i%4 if i%5 else (i+1)%4

def small_dls(how):
    ds = Datasets(list(range(N)), [[_x],[_y]])
    workers = 2 if how == 'workers' else 0
    kw = dict(bs=16, shuffle=True, drop_last=how == 'drop_last', num_workers=workers, device='cpu')
    train = WeightedDL(ds, wgts=np.arange(N)%3+.1, **kw) if how == 'weighted' else TfmdDL(ds, **kw)
    return DataLoaders(train, TfmdDL(ds, bs=64), device='cpu')

def let_a_cpu_autocast(monkeypatch):
    import fastai.callback.fp16 as m
    monkeypatch.setattr(m, 'autocast', lambda dev, dtype: torch.autocast('cpu', dtype=dtype))
    monkeypatch.setattr(m, 'GradScaler', lambda dev, **kw: torch.amp.GradScaler('cpu', **kw))

WAYS = ('shuffled', 'evidence', 'weighted', 'drop_last', 'workers', 'bf16', 'accumulation', 'k1', 'folds')

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', WAYS)
def test_the_ledger_is_exact(how, monkeypatch):
    if how == 'folds': monkeypatch.setattr(Sightings, 'limit', 3*16*4*4)
    set_seed(1)
    model = nn.Sequential(nn.Linear(8,32), nn.ReLU(), nn.Linear(32,4))
    learn = quiet(Learner(small_dls(how), model, loss_func=CrossEntropyLossFlat()))
    if how == 'bf16':
        let_a_cpu_autocast(monkeypatch)
        learn.to_bf16()
    cb,slow = JoCorCallback(k=1 if how == 'k1' else 3, forget_rate=.3, num_gradual=2, rounding='official'),Slow(N)
    if how == 'evidence': cb = JoCorCallback(k=3)
    cbs = [cb, slow] + [GradientAccumulation(48)]*(how == 'accumulation')
    learn.fit(2, 1e-2, cbs=cbs)
    learn.fit(3, 1e-2, cbs=cbs)
    want,got = slow.frame(),cb.items.frame()
    if how == 'weighted': assert want.seen.max() > 8 and want.seen.min() < 5
    elif how == 'drop_last': assert want.seen.sum() == 5*(N//16*16) and want.seen.min() < 5
    else: assert (want.seen == 5).all()
    if how == 'evidence': assert cb.by_evidence and 0 < (want.kept < 1).mean() < .9
    got = got[list(want)].reset_index(drop=True)
    pd.testing.assert_frame_equal(got, want, check_dtype=False, check_names=False, rtol=1e-4, atol=2e-5)
    state = cb.items.state()
    assert state.keys() == {*Ledger._ints, *Ledger._floats}
    assert sum(o.element_size() for o in state.values()) < 100

# what is worked out for many batches at once, item by item in float64

def row_of(z, p, y, k):
    "What one item shows: logits `(k, C)`, mean probability `(C,)`, and its label or labels"
    if y.ndim == 0:
        return dict(prob=float(p[y]), conf=float(p.max()), predicted_label=int(p.argmax()), given_label=int(y),
                    as_given=int(p.argmax()) == int(y), agree=len({int(o.argmax()) for o in z}) == 1)
    right = [float(q) if o else 1-float(q) for q,o in zip(p, y)]
    conf = sum(max(float(q), 1-float(q)) for q in p)/len(y)
    return dict(prob=sum(right)/len(y), conf=conf, predicted_label=-1, given_label=-1,
                as_given=all(o > .5 for o in right), agree=all(((o > 0) == (z[0] > 0)).all() for o in z))

@given(seed=st.integers(0, 10**6), prune=st.booleans(), counts=st.booleans(), told=st.booleans(), multi=st.booleans(),
       limit=st.sampled_from([1, 60, 10**6]))
def test_sightings_against_a_loop(seed, prune, counts, told, multi, limit):
    rs,k,C = np.random.RandomState(seed),3,4
    fit,want,offset = Selection(),[],0
    s = Sightings(fit)
    ns = rs.randint(1, 7, rs.randint(1, 6)).tolist()
    s.limit = limit
    pos,repeated = torch.as_tensor(rs.permutation(sum(ns))),torch.as_tensor(rs.rand(sum(ns)) < .3)
    if told: fit.items,fit.repeated = pos,repeated
    for b,n in enumerate(ns):
        m = int(rs.randint(1, n+1)) if prune and b%2 else n
        pruned = None if m == n else torch.as_tensor(rs.permutation(n)[:m])
        z = torch.as_tensor(rs.randn(k, m, C))
        y = torch.as_tensor(rs.randint(0, 2, (m,C)).astype(float) if multi else rs.randint(0, C, m))
        mean = z.sigmoid().mean(0) if multi else z.softmax(-1).mean(0)
        loss = torch.as_tensor(rs.rand(m).astype(np.float32))
        loss[rs.rand(m) < .1] = torch.nan
        kept = rs.randint(0, 3, m).astype(np.float32) if counts else np.unique(rs.randint(0, m, m))
        fit.at,fit.n,fit.pruned,fit.kept,fit.losses = offset,n,pruned,torch.as_tensor(kept),loss
        fit.logits,fit.pred,fit.targ = z,mean.logit() if multi else mean.log(),y
        s.add()
        places = list(range(n)) if pruned is None else pruned.tolist()
        for i in range(n):
            row = dict(idx=int(pos[offset+i]) if told else 0, repeated=bool(repeated[offset+i]) if told else False)
            if i not in places:
                want.append(row | dict(kept=0, loss=math.nan))
                continue
            j = places.index(i)
            row |= dict(kept=float(kept[j]) if counts else float(j in kept))
            row |= dict(loss=float(loss[j]) if loss[j].isfinite() else math.inf)
            want.append(row | row_of(z[:,j], mean[j], y[j], k))
        offset += n
    got = s.columns()
    assert list(got) == list(Sightings.dtypes) and (limit > 1 or len(s.folded) == len(ns))
    for i,row in enumerate(want):
        for name,v in row.items():
            np.testing.assert_allclose(float(got[name][i]), v, rtol=1e-5, atol=1e-6, err_msg=name)
    assert all(len(o) == offset for o in got.values())

# the noise rate

@given(seed=st.integers(0, 50), rate=st.sampled_from([0., .1, .3, .5]), c=st.integers(2, 12))
def test_the_confident_joint(seed, rate, c):
    "Against Northcutt's definition, item by item, with votes and the given label alone"
    rs,n = np.random.RandomState(seed),300
    true = rs.randint(0, c, n)
    labels = np.where(rs.rand(n) < rate, (true+rs.randint(1, c, n))%c, true)
    conf = rs.uniform(.5, 1, n)
    prob = np.where(labels == true, conf, (1-conf)*rs.rand(n))
    f = pd.DataFrame(dict(given_label=labels, predicted_label=true, prob=prob, conf=conf, agreement=1., stability=1.))
    least = {j: prob[labels == j].mean() for j in set(labels)}
    counts = np.zeros((c,c))
    for y,v,p,q in zip(labels, true, prob, conf):
        if v != y and v in least and q >= least[v]: counts[v,y] += 1
        elif p >= least[y]: counts[y,y] += 1
    want = np.zeros((c,c))
    for j in least: want[:,j] = counts[:,j]/counts[:,j].sum()*(labels == j).mean()
    J = confident_joint(f, c)
    np.testing.assert_allclose(J, want, atol=1e-12)
    assert J.sum() == pytest.approx(1) and (J >= 0).all()
    np.testing.assert_allclose(transition_of(J).sum(1), 1)
    if rate == 0: assert np.trace(J) == pytest.approx(1)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('noise', (None, 'symmetric:0.2', 'symmetric:0.5'))
def test_a_schedule_estimates_the_rate(noise):
    learn,cb = digits(noise),JoCorCallback(k=3, forget_rate='auto', rule='schedule')
    learn.fit_one_cycle(30, 1e-2, cbs=cb)
    h,true = cb.history,0. if noise is None else learn.dls.noise.rate
    assert abs(cb.estimate.rate-true) < .05 and cb.estimate.trusted
    w = cb.warm_up
    assert (h.R[:w] == 0).all() and h.noise_rate[:w-1].isna().all()
    assert (h.noise_rate[w-1:] == cb.estimate.rate).all()
    assert h.R[w:].tolist() == forget_schedule(cb.estimate.rate, 30, cb.gradual)[w:].tolist()
    assert learn.recorder.metric_names[7] == 'noise_rate'
    assert abs(cb.transition().diagonal().mean()-(1-true)) < .06

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('noise', (None, 'symmetric:0.2', 'symmetric:0.5'))
def test_the_one_line_tells_between_which_rates_the_true_one_lies(noise):
    learn,cb = digits(noise),JoCorCallback(k=3)
    learn.fit_one_cycle(30, 1e-2, cbs=cb)
    h,true,est = cb.history,0. if noise is None else learn.dls.noise.rate,cb.estimate
    assert est.has_interval and est.low-.03 <= true <= est.high+.03 and est.low <= est.rate <= est.high
    assert (h.noise_low <= h.noise_high).all() and h.noise_high.iloc[0] > est.high and est.high-est.low < .3
    assert (est.low,est.high) == (h.noise_low.iloc[-1],h.noise_high.iloc[-1])
    assert 'noise_rate' not in h and f'between {est.low:.0%} and {est.high:.0%}' in str(est)

@pytest.mark.filterwarnings('ignore')
def test_no_rate_is_needed_and_a_later_fit_keeps_the_estimate():
    learn,cb = digits(None),JoCorCallback(k=2, num_gradual=4)
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.estimate is None and math.isnan(cb.history.noise_rate[0])
    learn.fit(2, 1e-2, cbs=cb)
    est = cb.estimate
    assert est is not None and cb.history.noise_rate.tolist()[1:] == [est.rate]*2
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.estimate is est and cb.history.R.tolist()[3] == pytest.approx(est.rate)
    with learn.added_cbs(cb): learn.lr_find(num_it=5, show_plot=False)
    assert cb.estimate is est and len(cb.history) == 4

def test_an_estimate_that_is_not_to_be_trusted(recwarn):
    x = np.random.RandomState(0).randint(0, 256, (320,8,8), dtype=np.uint8)
    dls = InMemoryDataLoaders.from_arrays(x, np.arange(320)%10, bs=32)
    cb = JoCorCallback(k=3, rule='schedule')
    learn = quiet(Learner(dls, jocor_mlp(10, 64), opt_func=fast_adam))
    learn.fit(8, 1e-3, cbs=cb)
    told = [str(w.message) for w in recwarn if 'cannot be estimated' in str(w.message)]
    assert len(told) == 1 and not cb.estimate.trusted and 'forget_rate' in told[0]
    assert cb.estimate.rate < cb.estimate.joint
    assert (cb.warm_up,cb.gradual) == (2,4) and cb.history.noise_rate.isna().tolist() == [True]*3+[False]*5
    assert cb.history.R.max() == cb.estimate.rate

@pytest.mark.parametrize('told_at,trusted', ((1,True), (1,False), (2,True), (3,False), (None,False)))
def test_an_estimate_waits_as_long_as_the_rate_would_rise(monkeypatch, told_at, trusted):
    import fastai_jocor.record as m
    calls = []
    def estimates(items, n_classes):
        calls.append(items.frame().seen.max())
        known = len(calls) == told_at
        return NoiseEstimate(.1*len(calls) if known else 0., .5, .4, .3, trusted and known)
    monkeypatch.setattr(m, 'estimate_noise', estimates)
    cb,learn = JoCorCallback(k=2, forget_rate='auto', num_gradual=5),digits()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(4, 1e-3, cbs=cb)
        learn.fit(4, 1e-3, cbs=cb)
    told = [w for w in told if 'cannot be estimated' in str(w.message)]
    at,rate = told_at or 3,.1*(told_at or 0)
    assert calls == list(range(3, 3+at)) and cb.estimate.rate == pytest.approx(rate) and len(told) == (not trusted)
    h = cb.history
    assert h.noise_rate.isna().tolist() == [True]*(at+1) + [False]*(7-at) and (h.R[:at+2] == 0).all()
    assert h.R[at+2:].tolist() == pytest.approx(forget_schedule(rate, 8, 5)[at+2:])

@given(seed=st.integers(0, 200), single=st.booleans(), level=st.floats(0, 1))
def test_the_rate_where_votes_are_in_doubt(seed, single, level):
    rs,n,c = np.random.RandomState(seed),200,4
    labels,vote = rs.randint(0, c, n),rs.randint(0, c, n)
    vote = np.where(rs.rand(n) < .7, labels, vote)
    doubts = rs.rand(n)*level
    if (doubts == 0).all(): return
    f = pd.DataFrame(dict(given_label=labels, predicted_label=vote, prob=rs.rand(n)*.4, conf=rs.uniform(.4, 1, n),
                          agreement=1. if single else 1-doubts, stability=1-doubts))
    est,joint = estimate_noise(f, c),1-np.trace(confident_joint(f, c))
    doubt = math.fsum(doubts)/n
    votes = max(sum(int(a != b) for a,b in zip(vote, labels))/n - doubt, 0)
    want = joint if doubt <= .2 else 0 if single or doubt > .4 else min(joint, votes)
    assert est.rate == pytest.approx(min(want, .95)) and est.trusted == (doubt <= .2)
    assert est.doubt == pytest.approx(doubt) and est.votes == pytest.approx(votes)
    if est.trusted: return
    assert ('without dropping any item' in str(est)) == (est.rate == 0) and 'Pass forget_rate' in str(est)

def test_data_that_do_not_tell():
    x,y = torch.randn(96,8),torch.randint(0,4,(96,))
    dl = torch.utils.data.DataLoader(list(zip(x,y)), batch_size=32, shuffle=True)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))
    model = learn.model
    with pytest.raises(ValueError, match='forget_rate=None asks for an estimate'): learn.fit(1, cbs=JoCorCallback())
    assert learn.model is model
    with pytest.raises(ValueError, match="forget_rate='automatic'"): JoCorCallback(forget_rate='automatic')
