"The default rule: against a loop written out, what must always hold of its parts, and when it is taken."
import copy, math, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai.vision.all import BCEWithLogitsLossFlat, DataLoader, DataLoaders, Learner, CrossEntropyLossFlat, nn
from fastai_jocor.all import JoCorCallback, jocor_mlp
from fastai_jocor.selection import keep_by_margin
from fastai_jocor.evidence import brake_limit, close_epoch, Evidence, hidden_columns, look_at_batch, next_brake
from fastai_jocor.untold import hidden_from, hide
from fastai_jocor.margins import margin_threshold, protection
from fastai_jocor.interval import sure_error, wrong_share
from learners import Record, Step, digits, digits64, mlps64, quiet, same, tensors, weights
import reference, reference_evidence

pytestmark = pytest.mark.filterwarnings('ignore:the peers have not learned')

# --- against a loop

FITS = [(1, 5, 1e-2, {}, {}, 'margin'), (2, 8, 1e-2, {}, {}, 'margin floor contrast'),
    (3, 4, 1e-2, dict(seed=3), {}, 'margin floor contrast'),
    (2, 8, 1e-2, dict(forget_rate=.2), dict(tau=.2), 'margin floor'),
    (2, 8, 2e-2, dict(without=('margin',)), dict(by_margin=False), 'floor')]

@pytest.mark.parametrize('k,epochs,lr,kw,told,occurs', FITS)
def test_same_as_a_loop(k, epochs, lr, kw, told, occurs):
    learn,rec,nets,kept = digits64(),Record(),mlps64(k),[]
    twins = copy.deepcopy(nets)
    cb = JoCorCallback(k=k, models=nets, **kw)
    learn.fit(epochs, lr, cbs=[cb, rec, Step(lambda l: kept.append(l.selection.kept.nonzero()[:,0].tolist()))])
    hidden = hidden_from(1200, k, kw.get('seed', 0))
    rule,want,rates,ends = reference_evidence.train(twins, rec.batches, rec.items(learn), hidden, lr, **told)
    assert kept == [sorted(o) for o in want]
    reference.assert_same_weights(learn.model.peers, twins)
    history,est = cb.history,cb.estimate
    np.testing.assert_allclose(history.R, [R for R,_ in rates], atol=1e-9)
    np.testing.assert_allclose(history[['noise_low','noise_high']], ends, atol=1e-9)
    assert (est.low,est.high,est.rate) == pytest.approx((*ends[-1], rule.best['rate']))
    assert est.low < learn.dls.noise.rate < est.high
    found = dict(margin=rule.by_margin > 0, floor=rule.by_floor > 0, contrast=k > 1 and max(lam for _,lam in rates) > 0)
    assert ' '.join(name for name,o in found.items() if o) == occurs

# --- no gradient from what is hidden

WEIGHT = torch.linspace(.5, 2, 10, dtype=torch.float64)

LOSSES = dict(), dict(weight=WEIGHT), dict(label_smoothing=.1), dict(weight=WEIGHT, ignore_index=3)

@pytest.mark.parametrize('contrast,loss', [('kl',loss) for loss in LOSSES]+[('ce_circular',{})])
def test_hidden_items_give_no_gradient(contrast, loss):
    "Neither through the label nor through the contrast with the peers that know it"
    learn,seen = digits64(),[]
    learn.loss_func = nn.CrossEntropyLoss(**loss)
    cb = JoCorCallback(k=3, co_lambda=.5, contrast=contrast, models=mlps64(3))
    def look(l):
        s = l.selection
        logits = s.logits.clone().requires_grad_()
        s.log_probs = logits.log_softmax(-1)
        total,times,_ = cb.weigh.loss(logits, s.targ)
        total.backward()
        hidden = s.evidence.hidden[s.idx] == torch.arange(3)[:,None]
        got = (logits.grad != 0).any(-1)
        assert not got[hidden].any() and got[~hidden & (times > 0)].all()
        seen.append(int((hidden & (times > 0)).sum()))
    learn.fit(1, 1e-3, cbs=[cb, Step(look)])
    assert sum(seen) > 250

def test_hide():
    t = torch.randn(2, 3, 4, requires_grad=True)
    shown = hide(t, torch.tensor([-1,1,0]))
    shown.sum().backward()
    assert torch.equal(shown, t) and t.grad[...,0].tolist() == [[1,1,0],[1,0,1]]

# --- what always holds

@settings(max_examples=30)
@given(n=st.integers(0, 300), k=st.integers(1, 9), seed=st.integers(0, 99), part=st.floats(0, 1))
def test_hidden_from(n, k, seed, part):
    share = part/k
    hidden = hidden_from(n, k, seed, share)
    assert len(hidden) == n and torch.equal(hidden, hidden_from(n, k, seed, share))
    assert (hidden[:,None] == torch.arange(k)).sum(0).tolist() == [int(share*n+1e-9)]*k
    assert ((hidden >= -1) & (hidden < k)).all()
    assert n < 100 or not 9 < (hidden >= 0).sum() < n or not torch.equal(hidden, hidden_from(n, k, seed+1, share))

@st.composite
def margins(draw):
    by = draw(st.lists(st.integers(0, 40).map(lambda o: o/8), min_size=1, max_size=30))
    usable = draw(st.none() | st.lists(st.booleans(), min_size=len(by), max_size=len(by)))
    return by,draw(st.integers(0, 40).map(lambda o: o/8) | st.just(math.inf)),draw(st.integers(0, len(by)-1)),usable

@given(margins())
def test_keep_by_margin(o):
    by,threshold,n,usable = o
    as_tensor = None if usable is None else torch.tensor(usable)
    keep = keep_by_margin(torch.tensor(by), threshold, n, as_tensor)
    assert torch.equal(keep, keep_by_margin(torch.tensor(by), threshold, torch.tensor(n), as_tensor))
    may = [i for i in range(len(by)) if usable is None or usable[i]]
    kept = keep.nonzero()[:,0].tolist()
    assert set(kept) <= set(may) and (kept or not may)
    if not may: return
    least = min(by[i] for i in may)
    nth = sorted([by[i] for i in may], reverse=True)[min(n, len(may))-1] if n else math.inf
    for i in may: assert (i in kept) == (by[i] == least or not (by[i] > threshold or by[i] >= nth and by[i] > 0))
    against = sum(by[i] > max(least, 0) for i in may)
    assert len(may)-len(kept) >= min(n, against)

shares = st.lists(st.floats(0, 1), min_size=5, max_size=5).map(torch.tensor)

@given(votes=shares, labels=shares)
def test_protection(votes, labels):
    o = protection(votes, labels)
    assert ((o >= 0) & (o <= 1)).all() and (protection(votes+.1, labels) >= o).all()
    rare,common = labels < .4/5,labels > .6/5+1e-6
    assert (o[rare & (votes < .249*labels)] == 0).all() and (o[common & (votes < .099*labels)] == 0).all()
    assert (o[common & (votes > .401*labels)] == 1).all() and (o[(votes > .751*labels) & (labels > 1e-5)] == 1).all()
    assert (o[rare & (votes < .749*labels) & (labels > 1e-5)] < 1).all()

@given(U=st.floats(0, 1), more=st.floats(0, 1))
def test_margin_threshold(U, more):
    assert margin_threshold(max(U, more)) <= margin_threshold(min(U, more)) < 8
    assert margin_threshold(U) >= 1.5 and margin_threshold(.5) == 2
    assert margin_threshold(.1) == pytest.approx(2+math.log(9)) and margin_threshold(.9) == 1.5

share = st.floats(0, 1)
row = st.fixed_dictionaries({name: share for name in ('out','inside','against','alike','rate','low','high','sure')}
                            | dict(n=st.integers(1, 10000)))

@given(rows=st.lists(row, max_size=12), tau=st.none() | st.floats(0, .9), without=st.sampled_from(((), ('growth',))))
def test_the_least_share_to_drop(rows, tau, without):
    e = Evidence(100, 2, 10, tau=tau, without=without)
    for o in rows:
        o['rate'] = min(o['rate'], o['high'])
        o['low'] = min(o['low'], o['rate'])
        before,e.rows = e.brake,[*e.rows, o]
        e.brake = next_brake(e)
        looks_right = tau is None and e.best['sure'] < 2*(e.best['sure']*(1-e.best['sure'])/max(e.best['n']/2, 1))**.5
        limit = brake_limit(e)
        assert min(before, limit)*(e.brake > 0) <= e.brake <= min(e.R, limit) and e.brake <= before+.25+1e-9
        assert max(e.R, limit) <= e.U+1e-9 and (tau is None or limit == tau)
        assert len(e.rows) < 2 or not looks_right or e.brake == 0
        assert o['inside'] > o['out']+.01 or e.brake <= before
        assert o['alike'] > .7 or e.R == e.brake
        assert o['alike'] >= .25 or e.threshold == math.inf
        assert 0 <= e.co_lambda <= .8
    if tau is None and rows: assert e.U == max(rows, key=lambda o: o['out'])['high']

@pytest.mark.parametrize('k', [1, 3])
def test_no_brake_by_chance(k):
    "Networks that know nothing differ in what they say of few hidden labels"
    gen,brakes = torch.Generator().manual_seed(0),[]
    for seed in range(20):
        e,n = Evidence(120, k, 10, seed),torch.arange(120)
        for epoch in range(8):
            z,y = torch.randn(k, 120, 10, generator=gen),torch.randint(10, (120,), generator=gen)
            seen = hidden_columns(e, z, y, n)
            close_epoch(e, seen | dict(idx=n, given_label=y, as_given=z.mean(0).argmax(-1) == y))
        brakes.append(e.brake)
    assert np.mean(brakes) < .1

def test_no_brake_where_no_label_looks_wrong():
    "What is memorised then is right, and rare"
    row = dict(out=.9, inside=1., against=0., alike=.9, rate=0., low=0., high=.05, n=300)
    for sure,brakes in ((0.,False), (.02,False), (.1,True)):
        e = Evidence(1000, 3, 10)
        for _ in range(3):
            e.rows.append(dict(row, sure=sure))
            e.brake = next_brake(e)
        assert (e.brake > 0) == brakes

@given(out=share, sure=share, n=st.integers(1, 1000), alike=share)
def test_the_interval(out, sure, n, alike):
    rate,low,high = wrong_share(out, sure, n, alike)
    assert 0 <= low <= rate <= high <= 1 and (low == 0 or alike > .5)
    assert low <= sure

@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), share), min_size=1, max_size=40), st.floats(.01, 1))
def test_sure_error(votes, share):
    vote,label,conf = map(np.array, zip(*votes))
    assert 0 <= sure_error(vote, conf, label, share) <= 1+1e-9
    assert sure_error(vote, conf, vote, share) == 0
    assert sure_error(vote, conf, label, 1.) == pytest.approx((vote != label).mean())

# --- parts that are switched off

def few(k=2, n=256, **kwargs):
    "A fit on few digits, which are soon memorised"
    x,y = zip(*digits64().dls.train.dataset[:n])
    learn,nets = tensors(x, y, jocor_mlp(10, 64).double(), bs=32, loss_func=nn.CrossEntropyLoss()),mlps64(k)
    learn.fit(8, 2e-2, cbs=(cb := JoCorCallback(k=k, models=nets, **kwargs)))
    return learn,cb

def test_every_part_counts():
    "Some are seen only where nothing else drops items, or where items are dropped from the first epoch on"
    learn,cb = few()
    assert cb.history.R.iloc[-1] > 0 and cb.history.kept.iloc[-1] < .9
    with_others_off = dict(memorising=('margin','guess'), growth=('margin','guess'), protection=('doubt',))
    for part in set(Evidence.parts)-{'hardness'}: # which takes more items: in test_evidence_fits
        off,n = with_others_off.get(part, ()),1200 if part == 'guess' else 256
        base = weights(few(n=n, without=off)[0].model) if off or n > 256 else weights(learn.model)
        assert not same(weights(few(n=n, without=(*off,part))[0].model), base), part

@pytest.mark.parametrize('k', [2, 3])
def test_each_item_is_hidden_from_one_peer(k):
    _,cb = few(k, hidden=1/k)
    hidden = cb.evidence.hidden
    want = [256//k + (i < 256 % k) for i in range(k)]
    assert (hidden >= 0).all() and hidden.bincount().tolist() == want

def test_share_that_is_too_large():
    with pytest.raises(ValueError, match=r'hidden=0.4 must lie in \[0, 1/3\]'): JoCorCallback(k=3, hidden=.4)

def test_a_part_that_there_is_not():
    with pytest.raises(ValueError, match="without='margins' must be one of 'margin', 'memory'"):
        JoCorCallback(without=('margin','margins'))

# --- which rule

ASK_FOR_A_SCHEDULE = dict(num_gradual=3), dict(exponent=.5), dict(balance=.5), dict(prune='exact')

@pytest.mark.parametrize('kw', ASK_FOR_A_SCHEDULE)
def test_the_arguments_of_a_schedule_choose_it(kw):
    cb = JoCorCallback(**kw)
    digits(bs=512).fit(4, 1e-3, cbs=cb)
    assert not cb.by_evidence and 'noise_low' not in cb.history and cb.history.R.iloc[-1] == .5
    with pytest.raises(ValueError, match=f"{[*kw][0]}=.* is an argument of rule='schedule'"):
        JoCorCallback(rule='evidence', **kw)

@pytest.mark.parametrize('kw', ({}, dict(forget_rate='auto'), dict(co_lambda=.5), dict(forget_rate=.3)))
def test_evidence_is_the_default(kw):
    cb = JoCorCallback(**kw)
    digits(bs=512).fit(2, 1e-3, cbs=cb)
    assert cb.by_evidence and list(cb.history)[:6] == ['epoch','R','kept','agreement','noise_low','noise_high']
    known = kw.get('forget_rate') == .3
    assert cb.tau == (.3 if known else cb.estimate.rate) and (cb.evidence.U == .3) == known
    assert cb.lam == kw.get('co_lambda', cb.evidence.co_lambda)

def test_a_rule_that_there_is_not():
    with pytest.raises(ValueError, match="rule='best' must be one of None, 'evidence', 'schedule'"):
        JoCorCallback(rule='best')

def several_labels():
    x,y = torch.randn(96,8),(torch.rand(96,4) > .5).float()
    return tensors(x, y, nn.Linear(8,4), loss_func=BCEWithLogitsLossFlat())

def does_not_tell():
    dl = torch.utils.data.DataLoader(list(zip(torch.randn(96,8), torch.randint(0,4,(96,)))), batch_size=32)
    return quiet(Learner(DataLoaders(dl, dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))

@pytest.mark.parametrize('make', (several_labels,does_not_tell))
def test_data_for_a_schedule_only(make):
    learn,cb = make(),JoCorCallback(forget_rate=.25)
    learn.fit(3, 1e-3, cbs=cb)
    assert not cb.by_evidence and cb.history.R.tolist() == [0,.25,.25] and cb.evidence is None
    learn = make()
    model = learn.model
    with pytest.raises(ValueError, match="rule='evidence' needs one class per item"):
        learn.fit(1, cbs=JoCorCallback(rule='evidence', forget_rate=.25))
    with pytest.raises(ValueError, match='pass forget_rate'): learn.fit(1, cbs=JoCorCallback())
    assert learn.model is model

def test_a_subclass_with_a_loss_of_its_own_trains_by_the_schedule():
    class Own(JoCorCallback):
        def batch_loss(self, logits, targ, R): return super().batch_loss(logits, targ, R)
    class Rate(JoCorCallback):
        def rate_of(self, epoch): return .3
    class Named(JoCorCallback): pass
    assert [cb(k=2).rule for cb in (Own,Rate,Named)] == ['schedule','schedule',None]
    digits(bs=512).fit(1, 1e-3, cbs=(cb := Rate()))
    assert cb.history.R.tolist() == [.3] and cb.history.kept.iloc[0] == pytest.approx(.7, abs=.01)

def test_autocast_leaves_the_evidence_exact():
    "Mixed precision is for the networks: running shares stay in float32"
    log_p,targ = torch.randn(128,10).log_softmax(-1),torch.randint(0, 10, (128,))
    def running(half):
        e = Evidence(128, 2, 10)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=half): look_at_batch(e, log_p, targ, torch.arange(128))
        return e.running
    assert torch.equal(running(True), running(False))

@pytest.mark.parametrize('share,judges', [(None,False), (.1,False), (0.,False), (1/3,True)])
def test_the_limit_of_the_brake(share, judges):
    "Few hard items are dropped with caution, unless every label is hidden from a peer, as in an audit"
    e = Evidence(300, 3, 10, share=share)
    e.rows = 3*[dict(out=.6, inside=1., against=0., alike=.9, rate=.2, low=.1, high=.4, sure=.22, n=90)]
    cautious = .4+(1-90/1000)*(.2-(.22*.78/45)**.5-.4)
    assert brake_limit(e) == (.4 if judges else pytest.approx(cautious))
    for _ in range(9): e.brake = next_brake(e)
    assert e.brake == brake_limit(e)
    again = Evidence(300, 3, 10, share=share, tau=.3)
    assert brake_limit(again) == .3
