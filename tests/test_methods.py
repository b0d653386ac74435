"The compared methods: against loops written out, by property over random input, and through a learner's life."
import copy, numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from fastai.vision.all import BCEWithLogitsLossFlat, Callback, DataLoader, DataLoaders, Learner, nn, set_seed
from fastai_jocor.all import *
from sync import as_on_a_gpu
from learners import digits, digits64, quiet, Record

teaching = pytest.mark.parametrize('method', (CoTeachingCallback, CoTeachingPlusCallback))

def small(losses, rate, among):
    "Which of the items `among` have the smallest losses, by numpy"
    if not len(among): return among
    return among[np.argsort(losses[among], kind='stable')[:max(int((1-rate)*len(among)), 1)]]

def choose(zs, y, rate, plus, weight=None):
    "For each network the items on which it trains, one item and one pair of networks after the other"
    k,n = len(zs),len(y)
    losses = [np.array([F.cross_entropy(z[i:i+1], y[i:i+1], weight=weight, reduction='none').item() for i in range(n)]) for z in zs]
    best = [z.argmax(-1).tolist() for z in zs]
    pairs = [(m, 0 if m == k-1 else m+1) for m in range(k)]
    return [small(losses[t], rate, np.array([i for i in range(n) if not plus or best[m][i] != best[t][i]], dtype=int)) for m,t in pairs]

def loop(nets, batches, rates, plus, lr, weight=None):
    "Each network with an optimizer of its own, and a mean over what another one chose for it"
    opts,shares = [torch.optim.Adam(m.parameters(), lr=lr) for m in nets],[]
    for epoch,x,y in batches:
        zs = [m(x) for m in nets]
        chosen = choose([z.detach() for z in zs], y, rates[epoch], plus, weight)
        shares.append((epoch, sum(map(len, chosen))/len(nets), len(y)))
        for opt,z,idx in zip(opts, zs, chosen):
            losses = F.cross_entropy(z, y, weight=weight, reduction='none')
            opt.zero_grad()
            (losses[torch.as_tensor(idx)].mean() if len(idx) else losses.sum()*0).backward()
            opt.step()
    return shares

@pytest.mark.parametrize('k,weight', ((2,None),(3,None),(3,torch.linspace(.5,2,10,dtype=torch.float64))))
@teaching
def test_same_weights_as_a_loop(method, k, weight):
    learn,rec = digits64(weight),Record()
    nets = [jocor_mlp(10,64).double() for _ in range(k)]
    twins = copy.deepcopy(nets)
    cb = method(k=k, models=nets, forget_rate=.5)
    learn.fit(4, 1e-3, cbs=[cb, rec])
    shares = loop(twins, rec.batches, [0,.5,.5,.5], method is CoTeachingPlusCallback, 1e-3, weight)
    assert len(rec.batches) == 4*len(learn.dls.train) and cb.history.R.tolist() == [0,.5,.5,.5]
    for m,t in zip(learn.model.peers, twins):
        for a,b in zip(m.parameters(), t.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for e in range(4):
        kept,n = (sum(s[i] for s in shares if s[0]==e) for i in (1,2))
        assert cb.history.kept[e] == pytest.approx(kept/n, rel=1e-6)

def test_peers_teach_each_other():
    "A loop of self-taught networks gives other weights: the exchange is not lost in the tolerance"
    learn,rec = digits64(),Record()
    nets = [jocor_mlp(10,64).double() for _ in range(2)]
    twins = copy.deepcopy(nets)
    learn.fit(2, 1e-3, cbs=[CoTeachingCallback(models=nets, forget_rate=.5, num_gradual=0), rec])
    opts = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in twins]
    for _,x,y in rec.batches:
        for m,opt in zip(twins, opts):
            losses = F.cross_entropy(m(x), y, reduction='none')
            opt.zero_grad()
            losses[select_small(losses, .5)].mean().backward()
            opt.step()
    assert max((a-b).abs().max().item() for a,b in zip(learn.model.parameters(), nn.ModuleList(twins).parameters())) > 1e-3

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
        assert not m[~fine].any()
        want = min(max(int((1-rate)*a.sum()), 1), fine.sum()) if a.any() else 0
        assert m.sum() == want
        if want: assert np.array_equal(np.sort(l[m==1]), np.sort(l[fine])[:want])

@given(st.integers(1,300), st.floats(0,.99))
def test_mask_counts_as_python_does(n, rate):
    assert small_loss_mask(torch.rand(1,n), rate).sum() == keep_count(n, rate)

def test_counts_at_rates_without_an_exact_binary_form():
    for n in range(1,200):
        for rate in (.1,.2,.3,.45,.7,.9): assert small_loss_mask(torch.arange(float(n))[None], rate).sum() == keep_count(n, rate)

def bare(cb, bad=None):
    "A callback that can be asked for the loss of a batch"
    cb.selection.bad = bad
    return cb

@teaching
@given(st.integers(2,4), st.integers(1,24), st.integers(2,5), st.floats(0,.9), st.integers(0,10**6))
def test_batch_loss_against_a_loop(method, k, n, c, rate, seed):
    g = torch.Generator().manual_seed(seed)
    z,y = torch.randn(k,n,c,generator=g,dtype=torch.float64).requires_grad_(),torch.randint(0,c,(n,),generator=g)
    loss,kept,losses = bare(method(k=k, forget_rate=.1)).batch_loss(z, y, rate)
    chosen = choose(z.detach(), y, rate, method is CoTeachingPlusCallback)
    each = [F.cross_entropy(z[m], y, reduction='none') for m in range(k)]
    want = sum(l[torch.as_tensor(i)].mean() if len(i) else l.sum()*0 for l,i in zip(each, chosen))
    torch.testing.assert_close(loss, want); torch.testing.assert_close(losses, sum(each))
    np.testing.assert_allclose(kept, [sum(i in o for o in chosen)/k for i in range(n)], rtol=1e-6)
    a,b = torch.autograd.grad(loss, z)[0],torch.autograd.grad(want, z)[0]
    torch.testing.assert_close(a, b)

@teaching
def test_bad_items_train_nobody(method):
    z,y = torch.randn(3,20,4).requires_grad_(),torch.randint(0,4,(20,))
    bad = torch.arange(20) % 3 == 0
    loss,kept,losses = bare(method(k=3, forget_rate=.1), bad).batch_loss(z, y, 0.)
    grad = torch.autograd.grad(loss, z)[0]
    assert not kept[bad].any() and kept[~bad].any() and losses[bad].isinf().all() and losses[~bad].isfinite().all()
    assert not grad[:,bad].any() and grad.isfinite().all()

def test_an_item_without_a_finite_loss_by_one_peer_trains_none():
    "A loss of the user's that is infinite for the student and small for the teacher"
    cb = bare(CoTeachingCallback(forget_rate=.1))
    cb.selection.per_sample = lambda z,y: torch.where(z[:,0] > 100, torch.inf, F.cross_entropy(z, y, reduction='none'))
    z,y = torch.randn(2,10,3),torch.randint(0,3,(10,))
    z[0,4,0] = 200.
    loss,kept,_ = cb.batch_loss(z, y, 0.)
    assert loss.isfinite() and kept[4] == 0 and (kept.sum() == 9)

def test_without_disagreement_plain_sgd_does_not_move():
    from fastai.vision.all import SGD
    learn = digits(opt_func=SGD)
    net = jocor_mlp(10,64)
    twin = copy.deepcopy(net)
    with torch.no_grad(): twin[1].weight[0,0] += 1e-3
    before = [p.clone() for m in (net,twin) for p in m.parameters()]
    x = torch.cat([b[0] for b in learn.dls.train]).as_subclass(torch.Tensor)
    assert (net(x).argmax(-1) == twin(x).argmax(-1)).all()
    cb = CoTeachingPlusCallback(models=[net,twin])
    learn.fit(1, 1e-1, cbs=cb)
    assert all(torch.equal(a,b) for a,b in zip(before, learn.model.parameters()))
    assert cb.history.kept.tolist() == [0] and cb.history.label_precision.isna().all() and cb.history.agreement.tolist() == [1]

@teaching
@pytest.mark.parametrize('k', (2,3))
def test_the_step_does_not_synchronise(method, k, monkeypatch):
    seen = []
    loose = digits()
    loose.fit(2, 1e-3, cbs=method(k=k, seed=1))
    learn = digits()
    with monkeypatch.context() as m:
        as_on_a_gpu(m, seen)
        learn.fit(2, 1e-3, cbs=method(k=k, seed=1))
    assert {torch.ops.aten.sort.default, torch.ops.aten._log_softmax.default} <= set(seen)
    for a,b in zip(learn.model.parameters(), loose.model.parameters()): assert torch.equal(a, b)

@teaching
def test_figures_of_the_table_and_the_ledger(method):
    "Against a count by hand over the recorded batches, with nothing learned (lr 0)"
    learn,rec = digits(),Record()
    cb = method(k=3, seed=1, num_gradual=0)
    learn.fit(1, 0., cbs=[cb,rec])
    truth,given_ = learn.dls.noise.true,learn.dls.noise.noisy
    nets,order,hit,clean = learn.model.peers,np.array(learn.dls.train._DataLoader__idxs),0,0
    kept,losses,seen = np.zeros(len(truth)),np.full(len(truth), np.nan),np.zeros(len(truth), int)
    for b,(_,x,y) in enumerate(rec.batches):
        idx = order[b*64:b*64+len(y)]
        z = [m(x).detach() for m in nets]
        for o in choose(z, y, .5, method is CoTeachingPlusCallback): kept[idx[o]] += 1/3
        losses[idx],seen[idx] = sum(F.cross_entropy(o, y, reduction='none') for o in z),1
    ok = truth == given_
    row,frame = cb.history.iloc[0],cb.items.frame()
    np.testing.assert_allclose(row[['kept','label_precision','label_recall']].astype(float), [kept.sum()/seen.sum(), kept[ok].sum()/kept.sum(), kept[ok].sum()/(ok & (seen==1)).sum()], rtol=1e-5)
    np.testing.assert_allclose(frame.kept, np.where(seen, kept, np.nan), rtol=1e-5)
    np.testing.assert_allclose(frame.last_loss, losses, rtol=1e-4)

@teaching
def test_resumed_run_is_the_whole_run(method, tmp_path):
    class Interrupt(Callback):
        def before_epoch(self):
            if self.epoch == 3: raise KeyboardInterrupt
    def train(seed, *cbs):
        learn,cb = digits(seed=seed, path=tmp_path),method(k=2)
        learn.fit_one_cycle(6, 3e-3, cbs=[cb, *cbs])
        return [p.detach() for p in learn.model.parameters()],cb.history,cb.items.frame()
    weights,history,frame = train(3)
    with pytest.raises(KeyboardInterrupt): train(3, Checkpoint(), Interrupt())
    weights2,history2,frame2 = train(1003, Checkpoint())
    assert all(torch.equal(a, b) for a,b in zip(weights, weights2))
    assert history.equals(history2) and frame.equals(frame2)
    assert len(history) == 6 and history.R.nunique() > 2

@teaching
def test_it_learns_and_the_learner_goes_on(method, tmp_path):
    learn,cb = digits(path=tmp_path),method(k=2)
    learn.fit_one_cycle(20, 2e-2, cbs=cb)
    assert learn.validate()[1] > .8 and (cb.history.label_precision.iloc[-1] > .85 or method is CoTeachingPlusCallback)
    learn.export()
    from fastai.vision.all import load_learner
    assert load_learner(tmp_path/'export.pkl').predict(learn.dls.valid_ds[0][0])[2].sum() == pytest.approx(1, abs=1e-5)
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))

@teaching
@pytest.mark.parametrize('kw,msg', [(dict(k=1),'k=1 must be at least 2'), (dict(k=0),'k=0'), (dict(k='2'),"k='2'"), (dict(k=True),'k=True'), (dict(forget_rate=1.),'forget_rate=1.0'), (dict(num_gradual=-1),'num_gradual=-1'), (dict(exponent=0.),'exponent=0.0'), (dict(select='all'),"select='all'")])
def test_bad_arguments(method, kw, msg):
    with pytest.raises(ValueError, match=msg): method(**kw)

@teaching
def test_several_labels_an_item_are_refused_before_anything_changes(method):
    dl = DataLoader(list(zip(torch.randn(64,8), torch.randint(0,2,(64,3)).float())), bs=32)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(8,3), loss_func=BCEWithLogitsLossFlat()))
    model = learn.model
    with pytest.raises(ValueError, match=f'{method.__name__} needs class indices'): learn.fit(1, cbs=method(forget_rate=.1))
    assert learn.model is model and learn.opt is not None and not any(isinstance(c, PeersCallback) for c in learn.cbs)

# --- losses ---

@given(st.integers(1,12), st.integers(2,6), st.integers(0,10**6))
def test_forward_loss_against_a_loop(n, c, seed):
    rs = np.random.RandomState(seed)
    T = rs.dirichlet(np.ones(c), c)
    z,y = rs.randn(n,c)*5,rs.randint(0,c,n)
    p = np.exp(z)/np.exp(z).sum(1,keepdims=True)
    want = [-np.log(sum(T[i,y[j]]*p[j,i] for i in range(c))) for j in range(n)]
    for reduction,f in dict(none=np.asarray, mean=np.mean, sum=np.sum).items():
        np.testing.assert_allclose(ForwardLoss(T, reduction=reduction).func(torch.tensor(z), torch.tensor(y)), f(want), rtol=1e-6)
        np.testing.assert_allclose(ForwardLoss(T, reduction=reduction)(torch.tensor(z), torch.tensor(y)), f(want), rtol=1e-4, atol=1e-5)

@given(st.integers(1,12), st.integers(2,6), st.floats(0,10), st.floats(0,10), st.floats(-10,-.1), st.integers(0,10**6))
def test_sce_loss_against_a_loop(n, c, alpha, beta, A, seed):
    rs = np.random.RandomState(seed)
    z,y = rs.randn(n,c)*5,rs.randint(0,c,n)
    p = np.exp(z)/np.exp(z).sum(1,keepdims=True)
    want = [-alpha*np.log(p[j,y[j]]) - beta*sum(p[j,i]*(0 if i==y[j] else A) for i in range(c)) for j in range(n)]
    for reduction,f in dict(none=np.asarray, mean=np.mean, sum=np.sum).items():
        np.testing.assert_allclose(SCELoss(alpha, beta, A, reduction=reduction).func(torch.tensor(z), torch.tensor(y)), f(want), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(SCELoss(alpha, beta, A, reduction=reduction)(torch.tensor(z), torch.tensor(y)), f(want), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('loss', (lambda: ForwardLoss(Symmetric(.5).transition(10)), SCELoss))
def test_losses_are_finite_at_the_extremes(loss):
    z = torch.tensor([[1e4]+[0.]*9,[-1e4]+[0.]*9]*2, requires_grad=True)
    l = loss()(z, torch.tensor([0,0,1,1]))
    l.backward()
    assert l.isfinite() and z.grad.isfinite().all()

@pytest.mark.parametrize('loss', (lambda: ForwardLoss(Symmetric(.5).transition(10)), SCELoss))
@pytest.mark.parametrize('method', (JoCorCallback, CoTeachingCallback, CoTeachingPlusCallback, None))
def test_losses_train_alone_and_under_every_callback(loss, method, tmp_path):
    learn = digits(loss_func=loss(), path=tmp_path)
    cb = method and method(k=2)
    learn.fit_one_cycle(8, 2e-2, cbs=cb)
    assert learn.validate()[1] > .6 and learn.loss_func.reduction == 'mean'
    probs,_,dec = learn.get_preds(with_decoded=True)
    assert torch.equal(probs.argmax(-1), torch.as_tensor(dec)) and probs.sum(-1).allclose(torch.ones(len(probs)), atol=1e-5)
    learn.export()

@pytest.mark.parametrize('make,msg', [(lambda: ForwardLoss([[.5,.4],[0,1]]),'row-stochastic'), (lambda: ForwardLoss([[1.,0,0],[0,1.,0]]),'must be square'), (lambda: ForwardLoss([[float('nan')]*2,[0,1]]),'row-stochastic'), (lambda: ForwardLoss([[1.5,-.5],[0,1]]),'row-stochastic'),
    (lambda: SCELoss(alpha=-.1),'alpha=-0.1'), (lambda: SCELoss(beta=float('inf')),'beta=inf'), (lambda: SCELoss(A=0.),'A=0.0'), (lambda: SCELoss(alpha='1'),"alpha='1'")])
def test_bad_losses(make, msg):
    with pytest.raises(ValueError, match=msg): make()

def test_a_matrix_of_other_classes_is_refused_before_training():
    learn = digits(loss_func=ForwardLoss(np.eye(4)))
    model = learn.model
    with pytest.raises(ValueError, match='does not fit logits of 10 classes'): learn.fit(1, cbs=JoCorCallback())
    assert learn.model is model
