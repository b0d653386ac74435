"What selection throws away is not computed, and what is left is the same."
import copy, numpy as np, pytest, torch
from fastai.vision.all import Callback, DataLoader, DataLoaders, GradientAccumulation, Learner, nn, set_seed
from learners import digits, digits64, quiet
from fastai_jocor.all import *
from fastai_jocor.step import same_buffers, take_items

class Sizes(Callback):
    "How many items each training batch brings, and how many the model sees in its pass with gradients"
    order,run_valid = 20,False
    def __init__(self): self.sizes = []
    def after_loss(self): self.sizes.append((self.epoch, self.selection.n, len(self.pred)))

@pytest.mark.parametrize('k', (1,3))
def test_exact_gives_the_same_weights(k):
    "Without layers that mix items, the gradient of the kept items is that of the whole batch"
    weights = []
    for prune in (None,'exact'):
        torch.manual_seed(0)
        learn,cb,sizes = digits64(),JoCorCallback(k=k, co_lambda=.8, forget_rate=.6, prune=prune, seed=1),Sizes()
        torch.manual_seed(1); learn.dls.train.rng.seed(1)
        learn.fit(4, 1e-3, cbs=[cb,sizes])
        weights.append([p.detach().clone() for p in learn.model.parameters()])
        for epoch,n,m in sizes.sizes: assert m == (n if prune is None or epoch == 0 else int(.4*n))
        if prune is None: want = cb.history,cb.items.frame()
    for a,b in zip(*weights): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    np.testing.assert_allclose(cb.history, want[0], atol=1e-6)
    np.testing.assert_allclose(cb.items.frame(), want[1], atol=1e-4)

def test_one_step_has_the_same_gradient():
    "Along a training of the whole batches: the pass over the kept items alone gives the gradient of the step, in float32"
    grads = []
    class Grad(Callback):
        order,run_valid = 80,False
        def before_step(self): grads.append([p.grad.clone() for p in self.model.parameters()])
        def after_pred(self): pass
    for prune in (None,'exact'):
        learn = digits()
        learn.fit(1, 0., cbs=[JoCorCallback(k=3, forget_rate=.8, num_gradual=0, prune=prune, seed=1), Grad()])
    half = len(grads)//2
    for a,b in zip(grads[:half], grads[half:]):
        for p,q in zip(a,b): torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)

def normed(): return nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32,10))

def test_running_means_are_those_of_the_kept_items():
    set_seed(0)
    dls = digits_dls(noise=Symmetric(.5))
    learn,seen = quiet(Learner(dls, normed())),[]
    class See(Callback):
        order,run_valid = 20,False
        def before_batch(self): seen.append((self.xb[0].clone().as_subclass(torch.Tensor), copy.deepcopy(self.model.peers[0][:3])))
        def after_pred(self):
            x,m = seen[-1]
            m(x)
            for a,b in zip(m[2].buffers(), self.model.peers[0][2].buffers()): torch.testing.assert_close(a, b)
            assert m[2].num_batches_tracked == self.iter+1 and len(x) == int(.5*self.selection.n)
    learn.fit(1, 1e-3, cbs=[JoCorCallback(k=2, num_gradual=0, prune='exact'), See()])
    assert len(seen) == len(dls.train)

def test_approx_selects_by_the_losses_of_earlier_epochs():
    learn,chosen = digits(noise=Symmetric(.5)),[]
    cb = JoCorCallback(k=2, forget_rate=.5, num_gradual=0, prune='approx', refresh=3)
    class See(Callback):
        order,run_valid = 20,False
        def before_batch(self):
            idx = self.selection.idx
            chosen.append((self.epoch, idx.clone(), self.jo_cor.items.last_loss[idx].clone(), None if self.selection.pruned is None else self.selection.pruned.clone(), self.yb[0].clone()))
    learn.fit(7, 1e-3, cbs=[cb,See()])
    for epoch,idx,last,pruned,y in chosen:
        assert (pruned is None) == (epoch in (0,3,6))
        if pruned is None: continue
        assert set(pruned.tolist()) == set(np.argsort(np.nan_to_num(last.numpy(), nan=-1e9), kind='stable')[:len(idx)//2].tolist())
        assert torch.equal(y.as_subclass(torch.Tensor), torch.as_tensor(learn.dls.noise.noisy[idx[pruned].numpy()]))
    f = cb.items
    times,full = np.zeros(f.n),np.zeros(f.n)
    for epoch,idx,_,pruned,_ in chosen: times[(idx if pruned is None else idx[pruned]).numpy()] += 1; full[idx.numpy()] += 1
    assert (f.scored.numpy() == times).all() and (f.seen.numpy() == full).all() and cb.history.kept.round(1).tolist() == [.5]*7
    assert cb.history.label_precision.between(.5,1).all() and cb.history.agreement.between(.1,1).all()

def test_an_item_without_a_loss_is_taken():
    learn = digits()
    cb = JoCorCallback(k=2, forget_rate=.5, num_gradual=0, prune='approx')
    learn.fit(1, 1e-3, cbs=cb)
    cb.items.last_loss[:64] = torch.nan
    seen = []
    class See(Callback):
        order,run_valid = 20,False
        def before_batch(self): seen.append(self.selection.idx[self.selection.pruned])
    learn.fit(1, 1e-3, cbs=[cb,See()])
    taken,given = set(torch.cat(seen).tolist()),set(np.flatnonzero(cb.items.seen.numpy() == 2))
    assert len(taken & set(range(64))) > .9*len(given & set(range(64))) and not cb.items.last_loss[list(taken)].isnan().any()

@pytest.mark.parametrize('prune', ('exact','approx'))
def test_bad_items_are_not_taken(prune):
    set_seed(0)
    x,y = torch.randn(256,4),torch.randint(0,3,(256,))
    x[::7] = torch.nan
    dls = DataLoaders(DataLoader(list(zip(x,y)), bs=32, shuffle=True), DataLoader(list(zip(torch.zeros(9,4),y)), bs=9))
    learn = quiet(Learner(dls, nn.Linear(4,3), loss_func=nn.CrossEntropyLoss()))
    cb = JoCorCallback(k=2, forget_rate=.5, num_gradual=0, prune=prune)
    learn.fit(3, 1e-2, cbs=cb)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert (cb.items.kept[::7] == 0).all() and cb.items.kept.sum() == 3*128 and cb.history.non_finite.iloc[0] == len(x[::7])

def test_learns_as_well():
    accs = {}
    for prune in (None,'exact','approx'):
        learn = digits(noise=Symmetric(.5))
        learn.fit_one_cycle(30, 2e-2, cbs=JoCorCallback(k=3, prune=prune, seed=3))
        accs[prune] = learn.recorder.values[-1][2]
    assert min(accs.values()) > .85, accs

def test_refusals():
    for kw,msg in ((dict(prune='all'), "prune='all'"), (dict(refresh=0), 'refresh=0'), (dict(refresh=1.5), 'refresh=1.5')):
        with pytest.raises(ValueError, match=msg): JoCorCallback(**kw)
    learn = digits()
    model = learn.model
    with pytest.raises(ValueError, match='GradientAccumulation'): learn.fit(1, cbs=[JoCorCallback(prune='exact'), GradientAccumulation(128)])
    assert learn.model is model
    plain = torch.utils.data.DataLoader(list(zip(torch.randn(64,4), torch.randint(0,3,(64,)))), batch_size=16)
    other = quiet(Learner(DataLoaders(plain, plain), nn.Linear(4,3), loss_func=nn.CrossEntropyLoss()))
    with pytest.raises(ValueError, match="prune='approx' needs to know"): other.fit(1, cbs=JoCorCallback(forget_rate=.2, prune='approx'))
    other.fit(1, cbs=JoCorCallback(forget_rate=.2, num_gradual=0, prune='exact'))
    with pytest.raises(ValueError, match='type list'): take_items(['a','b'], torch.tensor([0]), 2)

def test_same_buffers_also_after_an_error():
    m = normed().train()
    before = [b.clone() for b in m.buffers()]
    with pytest.raises(RuntimeError), torch.no_grad(), same_buffers(m):
        m(torch.randn(8,64)); raise RuntimeError
    for a,b in zip(before, m.buffers()): assert torch.equal(a,b)
