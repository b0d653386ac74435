"How sure an ordinary fit is that labels are wrong: calibration on real data, where nothing was learned, what is kept."
import copy, numpy as np, pickle, pytest, torch, warnings
from fastai.vision.all import Learner, set_seed
from fastai_jocor.all import CoTeachingCallback, JoCorCallback, Symmetric, digits_dls, jocor_mlp
from fastai_jocor.certainty import carried
from fastai_jocor.evidence import Evidence, evidence_state, load_evidence
from fastai_jocor.posterior import calibration_error, find_temperature, transition_by_em
from fastai_jocor.untold import hidden_from, Untold
from hypothesis import given, settings, strategies as st
from learners import quiet
from scipy.optimize import minimize_scalar
from scipy.special import softmax

def digits(noise=Symmetric(.3), epochs=15, lr=1e-2, seed=0, **kwargs):
    set_seed(seed)
    learn,cb = quiet(Learner(digits_dls(noise=noise, bs=32), jocor_mlp(10, 64))),JoCorCallback(seed=seed, **kwargs)
    if epochs: learn.fit_one_cycle(epochs, lr, cbs=cb)
    else: learn.fit(1, 0., cbs=cb)
    return learn,cb

@pytest.fixture(scope='module')
def trained(): return digits(k=3)

# --- calibration

@pytest.mark.parametrize('k,noise,seed', [(3, Symmetric(.3), 0), (1, Symmetric(.3), 1), (2, None, 0)])
def test_probabilities_are_calibrated(k, noise, seed, trained):
    learn,cb = trained if k == 3 else digits(noise, k=k, seed=seed)
    flipped = np.zeros(1257, bool) if noise is None else learn.dls.noise.flipped
    p,e,s = cb.p_wrong,cb.expected_wrong(),cb.suspects()
    assert p.shape == (1257,) and ((p > 1e-4) & (p < 1-1e-4)).all()
    assert e['low'] <= p.sum()+1e-6 and p.sum() <= e['high']+1e-6 and e['expected'] == pytest.approx(p.sum())
    assert e['low'] <= flipped.sum() <= e['high']
    assert calibration_error(p, flipped) < .08
    assert e['listed'] == len(s) and e['in_list'] == pytest.approx(s.p_wrong.sum())
    if noise is not None: assert abs(e['in_list']-s.flipped.sum()) < .12*len(s) and s.flipped.sum() > .8*flipped.sum()

def test_the_list_is_cut_at_one_half(trained):
    learn,cb = trained
    f,s = cb.ledger,cb.suspects()
    want = {i for i in f.index if f.predicted_label[i] != f.given_label[i] and cb.p_wrong[i] >= .5}
    assert set(s.index) == want and s.score.is_monotonic_decreasing
    assert (s.p_wrong == cb.p_wrong[s.index]).all()
    assert set(cb.suspects(least=.95).index) == {i for i in s.index if cb.p_wrong[i] >= .95} < want
    assert want < set(cb.suspects(least=0).index) and cb.suspects(3).index.tolist() == s.index[:3].tolist()
    for bad in (-.1, 1.5):
        with pytest.raises(ValueError, match=f'least={bad} must lie in'): cb.suspects(least=bad)

# --- where nothing was learned, or too little

def test_a_fit_that_learned_nothing_lists_nothing():
    learn,cb = digits(epochs=0, k=3)
    assert not cb.certainty.learned and np.isnan(cb.p_wrong).all()
    with pytest.warns(UserWarning, match='no more often than by chance'): assert cb.plot_suspects() is None
    with pytest.warns(UserWarning, match='nothing can be said'): s = cb.suspects()
    assert len(s) == 0 and 'p_wrong' in s and 'by chance' in s.attrs['summary']['warning']
    with pytest.warns(UserWarning, match='nothing can be said'): s = cb.suspects(anyway=True)
    assert len(s) and s.p_wrong.isna().all()
    e = cb.expected_wrong()
    assert np.isnan(e['expected']) and (e['listed'],e['in_list'],e['n']) == (0,0,39*32)

def test_an_estimate_that_is_not_trusted_is_said_each_time(trained):
    cb = copy.copy(trained[1])
    cb.estimate = copy.copy(cb.estimate)
    cb.estimate.trusted = False
    cb._certainty = None
    with pytest.warns(UserWarning, match='do not know enough to be sure'): s = cb.suspects()
    assert len(s) and s.attrs['summary']['trusted'] is False
    for kw in ({}, dict(suspects=s)):
        with pytest.warns(UserWarning, match='do not know enough to be sure'): cb.plot_suspects(2, **kw)

@pytest.mark.parametrize('epochs,says', [(0, 'nothing can be said'), (12, 'Do not rely on this number')])
def test_the_page_says_what_the_list_says(trained, epochs, says, tmp_path):
    from fastai_jocor.lab.suspects_page import review_page
    learn,cb = digits(epochs=0, k=3) if not epochs else trained
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        s = cb.suspects(anyway=True)[:5]
    pages = []
    for trusted in (False, True):
        if epochs: s.attrs['summary']['trusted'] = trusted
        review_page(s, tmp_path/'page.html', pictures=['']*5)
        pages.append((tmp_path/'page.html').read_text(encoding='utf-8'))
    assert says in pages[0] and (says in pages[1]) == (not epochs)
    if epochs: assert f"About {cb.expected_wrong()['expected']:,.0f} of 1,257 labels are expected" in pages[0]

def test_nothing_is_said_of_a_fit_that_can_be_trusted(trained):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = trained[1].suspects()
        trained[1].plot_suspects(2, s)
    e = trained[1].expected_wrong()
    assert s.attrs['summary'] == dict(n_items=1257, expected_wrong=e['expected'], low=e['low'], high=e['high'],
                                      trusted=True)

@pytest.mark.parametrize('make', [lambda: JoCorCallback(k=2, rule='schedule'), lambda: CoTeachingCallback(),
                                  lambda: JoCorCallback(k=2, hidden=0.)])
def test_without_hidden_labels_all_is_as_before(make):
    set_seed(0)
    learn,cb = quiet(Learner(digits_dls(noise=Symmetric(.3), bs=32), jocor_mlp(10, 64))),make()
    learn.fit_one_cycle(6, 1e-2, cbs=cb)
    assert cb.p_wrong is None and 'p_wrong' not in cb.suspects() and len(cb.suspects()) > 100
    with pytest.raises(ValueError, match='least=0.9 needs probabilities'): cb.suspects(least=.9)
    with pytest.raises(ValueError, match='knows no probabilities'): cb.expected_wrong()

def test_with_few_items_all_is_as_before():
    "39 hidden labels say too little: by them, none of 29 wrong ones would be"
    set_seed(1)
    dls = digits_dls(noise=Symmetric(.25), bs=16)
    dls.train.get_idxs = lambda: list(range(130))
    learn,cb = quiet(Learner(dls, jocor_mlp(10, 64))),JoCorCallback(k=3, hidden=.02)
    learn.fit_one_cycle(8, 1e-2, cbs=cb)
    assert 0 < (cb.evidence.hidden >= 0).sum() < 100 and cb.certainty is None and 'p_wrong' not in cb.suspects()

def test_a_later_fit_says_something_else(trained):
    learn,cb = digits(epochs=4, k=2)
    before = cb.p_wrong
    assert cb.p_wrong is before                            # it is worked out once
    learn.fit(1, 1e-2, cbs=cb)
    assert not np.array_equal(cb.p_wrong, before)
    again = pickle.loads(pickle.dumps(cb))
    np.testing.assert_array_equal(again.p_wrong, cb.p_wrong)

# --- carried over by ranks

scores = st.lists(st.floats(0, 9), min_size=2, max_size=40)

@settings(max_examples=50)
@given(of_hidden=scores, of_told=scores, factor=st.floats(.1, 10), seed=st.integers(0, 9))
def test_carried(of_hidden, of_told, factor, seed):
    rng = np.random.default_rng(seed)
    hidden = rng.permutation(len(of_hidden)+len(of_told)) < len(of_hidden)
    score = np.empty(len(hidden))
    score[hidden],score[~hidden] = of_hidden,of_told
    at,p = np.flatnonzero(hidden),rng.random(len(of_hidden))
    res = carried(score, hidden, at, p)
    assert ((res >= p.min()-1e-9) & (res <= p.max()+1e-9)).all()
    for part in (hidden, ~hidden):
        order = np.argsort(score[part], kind='stable')
        assert (np.diff(res[part][order]) >= -1e-9).all()
    smaller = np.where(hidden, score, factor*score)       # losses of labels that were told, after memorising
    same = len(np.unique(smaller[~hidden])) == len(np.unique(score[~hidden]))
    if same: np.testing.assert_allclose(carried(smaller, hidden, at, p), res)
    if not np.isnan(res).any(): np.testing.assert_allclose(res[at].mean(), p.mean())

# --- what is kept

def test_what_the_hidden_peer_said_last_is_kept(monkeypatch):
    import fastai_jocor.record as record
    seen = {}
    def look(e, logits, targ, idx, repeated=None, _f=record.hidden_columns):
        for i,z in zip(idx.tolist(), logits.unbind(1)):
            if e.hidden[i] >= 0: seen[i] = z[e.hidden[i]].detach().float().log_softmax(-1).numpy()
        return _f(e, logits, targ, idx, repeated)
    monkeypatch.setattr(record, 'hidden_columns', look)
    learn,cb = digits(epochs=3, k=3)
    items,log_p = cb.evidence.untold.known()
    assert sorted(seen) == items.tolist() == np.flatnonzero(cb.evidence.hidden >= 0).tolist()
    np.testing.assert_allclose(log_p, [seen[i] for i in items], rtol=2e-3, atol=1e-3)

def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(Untold, 'limit', 500)
    learn,cb = digits(epochs=4, k=3)
    items,log_p = cb.evidence.untold.known()
    assert log_p.size <= 500 and 40 <= len(items) <= 50 and (cb.evidence.hidden[items] >= 0).all()
    assert len(set(cb.evidence.hidden[items].tolist())) == 3 and np.isfinite(cb.p_wrong).all()

def test_the_state_holds_it():
    learn,cb = digits(epochs=3, k=2)
    e = cb.evidence
    again = load_evidence(Evidence(e.n, e.k, e.n_classes, seed=5), evidence_state(e))
    for a,b in zip(again.untold.known(), e.untold.known()): np.testing.assert_array_equal(a, b)
    assert torch.equal(again.untold.place, e.untold.place)

def test_items_of_another_process_are_not_kept_twice():
    hidden = hidden_from(20, 2, share=.5)
    untold = Untold(hidden, 20, 3)
    first,second = torch.zeros(20, 3).log_softmax(-1),torch.eye(3)[torch.zeros(20, dtype=int)].log_softmax(-1)
    untold.add(torch.arange(20), first)
    untold.add(torch.arange(20), second, repeated=torch.arange(20) >= 5)
    rows,_ = untold.take_fresh()
    log_p = untold.known()[1]
    assert len(rows) == 20 and (log_p[:5].argmax(-1) == 0).all() and np.ptp(log_p[5:], axis=-1).max() == 0
    untold.add(torch.arange(3), second[:3])
    assert sorted(untold.take_fresh()[0].tolist()) == sorted(untold.place[:3].tolist())

# --- the search for a temperature

def test_the_search_is_the_one_by_em():
    rng = np.random.default_rng(0)
    true,C = rng.integers(0, 7, 300),7
    z = rng.normal(0, 1, (300,C)).astype(np.float32)
    z[np.arange(300),true] += 3
    labels = np.where(rng.random(300) < .3, rng.integers(0, C-1, 300), true)      # one class is never given
    less = lambda t: -transition_by_em(softmax(np.exp(t)*z, -1), labels, steps=15)[1]
    want = minimize_scalar(less, bounds=(np.log(.1), np.log(5)), method='bounded', options=dict(xatol=.02)).x
    assert find_temperature(z, labels) == pytest.approx(np.exp(want), rel=1e-6)
