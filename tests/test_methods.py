"The compared methods: against loops written out, by property over random input, and through a learner's life."
import copy, pytest, torch
import numpy as np
from hypothesis import given, strategies as st
from fastai.vision.all import BCEWithLogitsLossFlat, Callback, SGD, load_learner, nn, partial, set_seed
from fastai_jocor.all import *
from fastai_jocor.trainer import PeersCallback
from fastai_jocor.selection import small_loss_mask
from fastai_jocor.selection import keep_count
from learners import Record, digits, digits64, mlps64, same, tensors, weights
from sync import aten, as_on_a_gpu
import reference

teaching = pytest.mark.parametrize('method', (CoTeachingCallback, CoTeachingPlusCallback))
WEIGHT = torch.linspace(.5, 2, 10, dtype=torch.float64)

# --- against loops

@pytest.mark.parametrize('k,weight', ((2,None), (3,None), (3,WEIGHT)))
@teaching
def test_same_weights_as_a_loop(method, k, weight):
    learn,rec,nets = digits64(weight),Record(),mlps64(k)
    twins = copy.deepcopy(nets)
    cb = method(k=k, models=nets, forget_rate=.5, rounding='official')
    learn.fit(4, 1e-3, cbs=[cb, rec])
    shares = reference.co_teach(twins, rec.batches, [0,.5,.5,.5], 1e-3, method is CoTeachingPlusCallback, weight)
    assert len(rec.batches) == 4*len(learn.dls.train) and cb.history.R.tolist() == [0,.5,.5,.5]
    reference.assert_same_weights(learn.model.peers, twins)
    for e in range(4):
        kept,n = (sum(s[i] for s in shares if s[0] == e) for i in (1,2))
        assert cb.history.kept[e] == pytest.approx(kept/n, rel=1e-6)

def test_peers_teach_each_other():
    "A loop of self-taught networks gives other weights: the exchange is not lost in the tolerance"
    learn,rec,nets = digits64(),Record(),mlps64(2)
    twins = copy.deepcopy(nets)
    learn.fit(2, 1e-3, cbs=[CoTeachingCallback(models=nets, forget_rate=.5, num_gradual=0), rec])
    for m in twins: reference.train([m], rec.batches, [.5,.5], 1e-3)
    apart = [(a-b).abs().max().item() for a,b in zip(learn.model.parameters(), nn.ModuleList(twins).parameters())]
    assert max(apart) > 1e-3

@given(st.integers(1,4), st.integers(1,40), st.floats(0,.99), st.integers(0,10**6), st.booleans())
def test_mask_against_a_sort(k, n, rate, seed, ties):
    rs = np.random.RandomState(seed)
    losses = rs.randint(0,4,(k,n)).astype(float) if ties else rs.randn(k,n)
    losses[rs.rand(k,n) < .2] = rs.choice([np.nan,np.inf,-np.inf])
    among = rs.rand(k,n) < rs.rand()
    mask = small_loss_mask(torch.tensor(losses), rate, torch.tensor(among)).numpy()
    assert set(np.unique(mask)) <= {0,1} and mask.dtype == losses.dtype
    for l,a,m in zip(losses, among, mask):
        fine = a & np.isfinite(l)
        want = min(reference.n_kept(rate, a.sum()), fine.sum()) if a.any() else 0
        assert not m[~fine].any() and m.sum() == want
        if want: assert np.array_equal(np.sort(l[m==1]), np.sort(l[fine])[:want])

@given(st.integers(1,300), st.floats(0,.99))
def test_mask_counts_as_python_does(n, rate):
    assert small_loss_mask(torch.rand(1,n), rate).sum() == keep_count(n, rate)

@pytest.mark.parametrize('rate', (.1,.2,.3,.45,.7,.9))
def test_counts_at_rates_without_an_exact_binary_form(rate):
    for n in range(1,200): assert small_loss_mask(torch.arange(float(n))[None], rate).sum() == keep_count(n, rate)

def bare(cb, bad=None):
    "A callback that can be asked for the loss of a batch"
    cb.selection.bad = bad
    return cb

@teaching
@given(st.integers(2,4), st.integers(1,24), st.integers(2,5), st.floats(0,.9), st.integers(0,10**6))
def test_batch_loss_against_a_loop(method, k, n, c, rate, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(k, n, c, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, c, (n,), generator=g)
    loss,kept,losses = bare(method(k=k, forget_rate=.1, rounding='official')).batch_loss(z, y, rate)
    chosen = reference.taught(z.detach(), y, rate, method is CoTeachingPlusCallback)
    each = [reference.cross_entropy(o, y) for o in z]
    want = sum(reference.mean_of(l, idx) for l,idx in zip(each, chosen))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(losses, sum(each))
    np.testing.assert_allclose(kept, [sum(i in o for o in chosen)/k for i in range(n)], rtol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(want, z))

@teaching
def test_bad_items_train_nobody(method):
    z,y = torch.randn(3,20,4).requires_grad_(),torch.randint(0,4,(20,))
    bad = torch.arange(20) % 3 == 0
    loss,kept,losses = bare(method(k=3, forget_rate=.1), bad).batch_loss(z, y, 0.)
    grad = torch.autograd.grad(loss, z)[0]
    assert not kept[bad].any() and kept[~bad].any()
    assert losses[bad].isinf().all() and losses[~bad].isfinite().all()
    assert not grad[:,bad].any() and grad.isfinite().all()

def test_an_item_without_a_finite_loss_by_one_peer_trains_none():
    "A loss of the user's that is infinite for the student and small for the teacher"
    cb,z,y = bare(CoTeachingCallback(forget_rate=.1)),torch.randn(2,10,3),torch.randint(0,3,(10,))
    cb.selection.unweighted = lambda z,y: torch.where(z[:,0] > 100, torch.inf, reference.cross_entropy(z, y))
    z[0,4,0] = 200.
    loss,kept,_ = cb.batch_loss(z, y, 0.)
    assert loss.isfinite() and kept[4] == 0 and kept.sum() == 9

def test_without_disagreement_plain_sgd_does_not_move():
    learn,net = digits(opt_func=SGD),jocor_mlp(10, 64)
    twin = copy.deepcopy(net)
    with torch.no_grad():               # other logits, the same largest one
        for p in twin[3].parameters(): p *= 2
    before = weights(net) + weights(twin)
    cb = CoTeachingPlusCallback(models=[net, twin])
    learn.fit(1, 1e-1, cbs=cb)
    assert same(before, weights(learn.model))
    row = cb.history.iloc[0]
    assert row.kept == 0 and np.isnan(row.label_precision) and row.agreement == 1

@teaching
@pytest.mark.parametrize('k', (2,3))
def test_the_step_does_not_synchronise(method, k, monkeypatch):
    learn,loose,seen = digits(),digits(),[]
    loose.fit(2, 1e-3, cbs=method(k=k, seed=1))
    as_on_a_gpu(monkeypatch, seen)
    learn.fit(2, 1e-3, cbs=method(k=k, seed=1))
    assert {aten.sort.default, aten._log_softmax.default} <= set(seen)
    assert same(weights(learn.model), weights(loose.model))

@teaching
def test_figures_of_the_table_and_the_ledger(method):
    "Against a count by hand over the recorded batches, with nothing learned (lr 0)"
    learn,rec = digits64(),Record()
    cb = method(k=3, seed=1, num_gradual=0, rounding='official')
    learn.fit(1, 0., cbs=[cb, rec])
    right = ~learn.dls.noise.flipped
    kept,losses = np.zeros(len(right)),np.full(len(right), np.nan)
    for idx,(_,x,y) in zip(rec.items(learn), rec.batches):
        zs = [m(x).detach() for m in learn.model.peers]
        for chosen in reference.taught(zs, y, .5, method is CoTeachingPlusCallback): kept[idx[chosen]] += 1/3
        losses[idx] = sum(reference.cross_entropy(z, y) for z in zs)
    row,frame = cb.history.iloc[0],cb.items.frame()
    want = [kept.sum()/len(kept), kept[right].sum()/kept.sum(), kept[right].sum()/right.sum()]
    np.testing.assert_allclose(row[['kept','label_precision','label_recall']].astype(float), want, rtol=1e-5)
    np.testing.assert_allclose(frame.kept, kept, rtol=1e-5)
    np.testing.assert_allclose(frame.last_loss, losses, rtol=1e-4)

# --- a learner's life

class InterruptAt(Callback):
    def __init__(self, epoch): self.at = epoch
    def before_epoch(self):
        if self.epoch == self.at: raise KeyboardInterrupt

@teaching
def test_resumed_run_is_the_whole_run(method, tmp_path):
    def train(seed, *cbs):
        torch.manual_seed(seed)
        learn,cb = digits(model=jocor_mlp(10, 64), path=tmp_path),method(k=2)
        set_seed(seed)
        learn.fit_one_cycle(6, 3e-3, cbs=[cb, *cbs])
        return weights(learn.model),cb.history,cb.items.frame()
    whole,history,frame = train(3)
    with pytest.raises(KeyboardInterrupt): train(3, Checkpoint(), InterruptAt(3))
    resumed,history2,frame2 = train(1003, Checkpoint())
    assert same(whole, resumed) and history.equals(history2) and frame.equals(frame2)
    assert len(history) == 6 and history.R.nunique() > 2

@teaching
def test_it_learns_and_the_learner_goes_on(method, tmp_path):
    learn,cb = digits(path=tmp_path),method(k=2)
    learn.fit_one_cycle(20, 2e-2, cbs=cb)
    assert learn.validate()[1] > .6
    if method is CoTeachingCallback: assert cb.history.label_precision.iloc[-1] > .7
    learn.export()
    probs = load_learner(tmp_path/'export.pkl').predict(learn.dls.valid_ds[0][0])[2]
    assert probs.sum() == pytest.approx(1, abs=1e-5)
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))

BAD_ARGUMENTS = [(dict(k=1), 'k=1 must be at least 2'), (dict(k=0), 'k=0'), (dict(k='2'), "k='2'"),
    (dict(k=True), 'k=True'), (dict(forget_rate=1.), 'forget_rate=1.0'), (dict(num_gradual=-1), 'num_gradual=-1'),
    (dict(exponent=0.), 'exponent=0.0'), (dict(select='all'), "select='all'")]

@teaching
@pytest.mark.parametrize('kw,msg', BAD_ARGUMENTS)
def test_bad_arguments(method, kw, msg):
    with pytest.raises(ValueError, match=msg): method(**kw)

@teaching
def test_several_labels_an_item_are_refused_before_anything_changes(method):
    y = torch.randint(0, 2, (64,3)).float()
    learn = tensors(torch.randn(64,8), y, nn.Linear(8,3), loss_func=BCEWithLogitsLossFlat())
    model = learn.model
    with pytest.raises(ValueError, match=f'{method.__name__} needs class indices'):
        learn.fit(1, cbs=method(forget_rate=.1))
    assert learn.model is model and not any(isinstance(c, PeersCallback) for c in learn.cbs)

# --- losses

REDUCTIONS = dict(none=np.asarray, mean=np.mean, sum=np.sum)

def random_batch(n, c, seed):
    "Logits, labels and probabilities in numpy"
    rs = np.random.RandomState(seed)
    z,y = rs.randn(n,c)*5,rs.randint(0,c,n)
    p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    return rs,z,y,p

def assert_reductions(make, z, y, want, atol):
    "Of the function in float64, and as fastai calls it in float32"
    z,y = torch.tensor(z),torch.tensor(y)
    for reduction,f in REDUCTIONS.items():
        loss = make(reduction=reduction)
        np.testing.assert_allclose(loss.func(z, y), f(want), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(loss(z, y), f(want), rtol=1e-4, atol=atol)

@given(st.integers(1,12), st.integers(2,6), st.integers(0,10**6))
def test_forward_loss_against_a_loop(n, c, seed):
    rs,z,y,p = random_batch(n, c, seed)
    T = rs.dirichlet(np.ones(c), c)
    want = [-np.log(sum(T[i,y[j]]*p[j,i] for i in range(c))) for j in range(n)]
    assert_reductions(partial(ForwardLoss, T), z, y, want, 1e-5)

@given(st.integers(1,12), st.integers(2,6), st.floats(0,10), st.floats(0,10), st.floats(-10,-.1), st.integers(0,10**6))
def test_sce_loss_against_a_loop(n, c, alpha, beta, A, seed):
    _,z,y,p = random_batch(n, c, seed)
    reverse = lambda j: sum(p[j,i]*(0 if i == y[j] else A) for i in range(c))
    want = [-alpha*np.log(p[j,y[j]]) - beta*reverse(j) for j in range(n)]
    assert_reductions(partial(SCELoss, alpha, beta, A), z, y, want, 1e-4)

def forward_loss(): return ForwardLoss(Symmetric(.5).transition(10))
losses = pytest.mark.parametrize('loss', (forward_loss, SCELoss))

@losses
def test_losses_are_finite_at_the_extremes(loss):
    z = torch.tensor([[1e4]+[0.]*9,[-1e4]+[0.]*9]*2, requires_grad=True)
    l = loss()(z, torch.tensor([0,0,1,1]))
    l.backward()
    assert l.isfinite() and z.grad.isfinite().all()

@losses
@pytest.mark.parametrize('method', (JoCorCallback, CoTeachingCallback, CoTeachingPlusCallback, None))
def test_losses_train_alone_and_under_every_callback(loss, method, tmp_path):
    learn = digits(loss_func=loss(), path=tmp_path)
    learn.fit_one_cycle(8, 2e-2, cbs=method and method(k=2))
    assert learn.validate()[1] > .4 and learn.loss_func.reduction == 'mean'
    probs,_,decoded = learn.get_preds(with_decoded=True)
    assert torch.equal(probs.argmax(-1), torch.as_tensor(decoded))
    assert probs.sum(-1).allclose(torch.ones(len(probs)), atol=1e-5)
    learn.export()

BAD_LOSSES = [(lambda: ForwardLoss([[.5,.4],[0,1]]), 'row-stochastic'),
    (lambda: ForwardLoss([[1.,0,0],[0,1.,0]]), 'must be square'),
    (lambda: ForwardLoss([[float('nan')]*2,[0,1]]), 'row-stochastic'),
    (lambda: ForwardLoss([[1.5,-.5],[0,1]]), 'row-stochastic'),
    (lambda: SCELoss(alpha=-.1), 'alpha=-0.1'), (lambda: SCELoss(beta=float('inf')), 'beta=inf'),
    (lambda: SCELoss(A=0.), 'A=0.0'), (lambda: SCELoss(alpha='1'), "alpha='1'")]

@pytest.mark.parametrize('make,msg', BAD_LOSSES)
def test_bad_losses(make, msg):
    with pytest.raises(ValueError, match=msg): make()

def test_a_matrix_of_other_classes_is_refused_before_training():
    learn = digits(loss_func=ForwardLoss(np.eye(4)))
    model = learn.model
    with pytest.raises(ValueError, match='does not fit logits of 10 classes'): learn.fit(1, cbs=JoCorCallback())
    assert learn.model is model
