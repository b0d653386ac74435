"JoCorCallback on real learners: against a loop written out, through a learner's life, and when things go wrong."
import copy, subprocess, sys, numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import (Adam, Callback, CancelBatchException, CrossEntropyLossFlat, CutMix, DataBlock, DataLoader, DataLoaders, ImageBlock, L, Learner, MixUp, PILImage, RandomSplitter, accuracy, get_image_files, load_learner, nn, params, parent_label, partial, plt, resnet18, vision_learner)
from fastai_jocor.all import *
from fastai_jocor.batch import per_sample_loss
from contextlib import contextmanager
from fastai_jocor.record import Sightings
from sync import as_on_a_gpu, guard_steps
from learners import digits, digits64, quiet, Record

def loop(nets, batches, rates, lam, lr, weight=None):
    "JoCoR as usually coded: pairs of peers, losses to numpy, an argsort"
    opt = torch.optim.Adam([p for m in nets for p in m.parameters()], lr=lr)
    k = len(nets)
    for epoch,x,y in batches:
        zs = [m(x) for m in nets]
        ce = sum(F.cross_entropy(z, y, weight=weight, reduction='none') for z in zs)
        kl = sum(F.kl_div(F.log_softmax(zs[n],-1), F.log_softmax(zs[m],-1), log_target=True, reduction='none').sum(-1)
                 for m in range(k) for n in range(k) if m != n)
        loss = (1-lam)*ce + lam*kl/max(k-1,1) if k>1 else ce
        kept = np.argsort(loss.detach().numpy())[:int((1-rates[epoch])*len(y))]
        opt.zero_grad()
        loss[torch.as_tensor(kept)].mean().backward()
        opt.step()

@pytest.mark.parametrize('k,weight', ((1,None),(2,None),(3,None),(3,torch.linspace(.5,2,10,dtype=torch.float64))))
def test_same_weights_as_a_loop(k, weight):
    learn,rec = digits64(weight),Record()
    nets = [jocor_mlp(10,64).double() for _ in range(k)]
    twins = copy.deepcopy(nets)
    cb = JoCorCallback(k=k, models=nets, co_lambda=.8, forget_rate=.5)
    learn.fit(4, 1e-3, cbs=[cb, rec])
    loop(twins, rec.batches, [0,.5,.5,.5], .8, 1e-3, weight)
    assert len(rec.batches) == 4*len(learn.dls.train) and cb.history.R.tolist() == [0,.5,.5,.5]
    for m,t in zip(learn.model.peers, twins):
        for a,b in zip(m.parameters(), t.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

def test_figures_of_the_table():
    "Against a count by hand over the recorded batches, with nothing learned (lr 0)"
    learn,rec = digits(),Record()
    cb = JoCorCallback(k=3, seed=1, num_gradual=0)
    learn.fit(1, 0., cbs=[cb,rec])
    truth,given = learn.dls.noise.true,learn.dls.noise.noisy
    nets,hit,kept,clean,agree,n = learn.model.peers,0,0,0,0,0
    order = np.array(learn.dls.train._DataLoader__idxs)
    for b,(_,x,y) in enumerate(rec.batches):
        idx = order[b*64:b*64+len(y)]
        assert (given[idx] == y.numpy()).all()
        z = torch.stack([m(x) for m in nets]).detach()
        sel = np.argsort(joint_loss(z, y, cb.co_lambda).numpy())[:len(y)//2]
        ok = truth[idx] == given[idx]
        hit,kept,clean,n = hit+ok[sel].sum(),kept+len(sel),clean+ok.sum(),n+len(y)
        best = z.argmax(-1)
        agree += int(((best[0]==best[1]) & (best[1]==best[2])).sum())
    row = cb.history.iloc[0]
    np.testing.assert_allclose(row[['R','kept','agreement','label_precision','label_recall']].astype(float),
                               [.5, kept/n, agree/n, hit/kept, hit/clean], rtol=1e-6)

def test_columns_and_history():
    learn,cb = digits(),JoCorCallback(k=2)
    learn.fit(2, 1e-3, cbs=cb)
    names = list(learn.recorder.metric_names)
    assert names == ['epoch','train_loss','valid_loss','accuracy','R','kept','agreement','label_precision','label_recall','non_finite','time']
    assert all(len(v) == len(names)-2 for v in learn.recorder.values)
    assert [v[3] for v in learn.recorder.values] == cb.history.R.tolist()
    assert len(learn.validate()) == 2
    assert list(digits(noise=None).fit(1, cbs=(c := JoCorCallback(forget_rate=.2))) or c.history) == ['epoch','R','kept','agreement','non_finite']

def test_columns_of_two_callbacks_keep_their_values():
    from fastai_jocor.lab.run import PeerAccuracy
    learn,cb,acc = digits(),JoCorCallback(k=2),PeerAccuracy()
    learn.fit(1, 1e-3, cbs=[acc,cb])
    row = dict(zip(list(learn.recorder.metric_names)[1:], learn.recorder.values[-1]))
    assert row['R'] == cb.history.R[0] and row['peer_accuracy'] == pytest.approx(np.mean(acc.each[0]))
    x,y = map(torch.cat, zip(*[(b[0],b[1]) for b in learn.dls.valid]))
    want = [(m.eval()(torch.Tensor(x)).argmax(-1) == torch.Tensor(y)).float().mean().item() for m in learn.model.peers]
    np.testing.assert_allclose(acc.each[0], want, rtol=1e-5)

def test_second_fit_keeps_peers_and_optimizer():
    learn = digits()
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    model,opt = learn.model,learn.opt
    steps = {p: opt.opt.state[p]['step'].item() for p in model.parameters()}
    learn.fit_one_cycle(1, 1e-3, cbs=JoCorCallback(k=2))
    assert learn.model is model and learn.opt is opt
    assert all(opt.opt.state[p]['step'].item() == 2*steps[p] for p in model.parameters())
    with pytest.raises(ValueError, match='k=3'): learn.fit(1, cbs=JoCorCallback(k=3))

def test_life_after_the_fit(tmp_path):
    learn = digits(path=tmp_path)
    learn.fit_one_cycle(3, 3e-3, cbs=JoCorCallback(k=3))
    assert not any(isinstance(c, PeersCallback) for c in learn.cbs) and len(learn.cbs) == 3
    preds,targs = learn.get_preds()
    x = torch.Tensor(torch.cat([b[0] for b in learn.dls.valid]))
    want = torch.stack([m.eval()(x).softmax(-1) for m in learn.model.peers]).mean(0)
    torch.testing.assert_close(torch.Tensor(preds), want, atol=1e-5, rtol=1e-5)
    loss,acc = learn.validate()
    assert acc == pytest.approx((want.argmax(-1)==torch.Tensor(targs)).float().mean().item())
    assert loss == pytest.approx(F.nll_loss(want.log(), torch.Tensor(targs)).item(), rel=1e-4)
    item = learn.dls.valid_ds[5][0]
    torch.testing.assert_close(learn.predict(item)[2], want[5], atol=1e-5, rtol=1e-5)
    learn.show_results(max_n=4); plt.close()

    learn.save('peers')
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1, 1e-2, cbs=JoCorCallback(k=3))
    learn.load('peers')
    assert all(torch.equal(a,b) for a,b in zip(before, learn.model.parameters()))

    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    torch.testing.assert_close(loaded.predict(item)[2], learn.predict(item)[2])
    single = loaded.model.peer(1)
    assert isinstance(single, nn.Sequential) and single(x[:4]).shape == (4,10)
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=3))

def test_attached_for_good():
    learn = digits(cbs=JoCorCallback(k=2))
    plain = learn.model
    assert len(learn.validate()) == 2 and learn.model is plain
    learn.fit(2, 1e-3)
    assert len(learn.validate()) == 2 and learn.get_preds()[0].shape[1] == 10
    learn.fit(1, 1e-3)
    learn.remove_cb(JoCorCallback)
    assert not any('column' in c.name for c in learn.cbs)

def test_optimizer_is_carried_over():
    split = lambda m: [params(m[1]), params(m[3])]
    learn = digits(opt_func=partial(Adam, mom=.7), splitter=split)
    learn.freeze()
    learn.fit(1, slice(1e-4,1e-2), wd=.123, cbs=JoCorCallback(k=3, init='all'))
    assert [len(g) for g in learn.opt.param_lists] == [6,6]
    assert [h['lr'] for h in learn.opt.hypers] == [1e-4,1e-2]
    assert all(h['wd'] == .123 and h['mom'] == .7 for h in learn.opt.hypers)
    assert learn.opt.frozen_idx == 1
    assert [p.requires_grad for m in learn.model.peers for p in (m[1].weight, m[3].weight)] == [False,True]*3
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())

def test_pretrained_body_is_copied():
    split = lambda m: [params(m[1]), params(m[3])]
    learn = digits(splitter=split)
    learn.freeze()
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    a,b = learn.model.peers
    assert torch.equal(a[1].weight, b[1].weight) and not torch.equal(a[3].weight, b[3].weight)

@pytest.mark.parametrize('k,kw', ((1,dict()),(3,dict()),(3,dict(prune='exact')),(3,dict(prune='approx', refresh=2)),(3,dict(balance=.5))))
def test_the_step_does_not_synchronise(k, kw, monkeypatch):
    seen = []
    monkeypatch.setattr(Sightings, 'limit', 2000)
    loose = digits()
    loose.fit(2, 1e-3, cbs=JoCorCallback(k=k, seed=1, **kw))
    learn = digits()
    with monkeypatch.context() as m:
        as_on_a_gpu(m, seen)
        learn.fit(2, 1e-3, cbs=JoCorCallback(k=k, seed=1, **kw))
    assert {torch.ops.aten.topk.default, torch.ops.aten._log_softmax.default, torch.ops.aten.cat.default} <= set(seen)
    for a,b in zip(learn.model.parameters(), loose.model.parameters()): assert torch.equal(a, b)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kw', (dict(), dict(prune='exact'), dict(prune='approx', refresh=2)))
def test_the_step_does_not_synchronise_on_a_gpu(kw, monkeypatch):
    @contextmanager
    def refuse():
        torch.cuda.set_sync_debug_mode('error')
        try: yield
        finally: torch.cuda.set_sync_debug_mode('default')
    guard_steps(monkeypatch, refuse, first=1)
    digits().fit(3, 1e-3, cbs=JoCorCallback(k=3, **kw))

class Stop(Callback):
    "Raise in an event of the third batch of the second epoch"
    def __init__(self, event, exc): self.exc = exc; setattr(self, event, self.stop)
    def stop(self):
        if getattr(self, 'training', False) and self.epoch==1 and self.iter==2: raise self.exc

@pytest.mark.parametrize('exc', (KeyboardInterrupt(), RuntimeError('a fault elsewhere')))
@pytest.mark.parametrize('event', ('before_batch','after_pred','after_loss','after_backward','before_step','after_batch'))
def test_interrupted_fit(event, exc):
    learn = digits()
    lf,cbs,logger = learn.loss_func,list(learn.cbs),learn.logger
    with pytest.raises(type(exc)): learn.fit(3, 1e-3, cbs=[JoCorCallback(k=2), Stop(event, exc)])
    assert learn.loss_func is lf and list(learn.cbs) == cbs and learn.logger is logger
    assert len(learn.validate()) == 2
    assert learn.get_preds()[0].shape[1] == 10
    assert event != 'before_step' or any((p.grad != 0).any() for p in learn.model.parameters())
    class Clean(Callback):
        def before_batch(self):
            if self.training and self.epoch==0 and self.iter==0: assert all(p.grad is None or (p.grad == 0).all() for p in self.model.parameters())
    cb = JoCorCallback(k=2)
    learn.fit(2, 1e-3, cbs=[cb, Clean()])
    assert len(cb.history) == 2 and all(p.isfinite().all() for p in learn.model.parameters())

def test_a_refused_fit_changes_nothing():
    learn = digits(noise=None)
    learn.create_opt()
    model,opt,splitter,n = learn.model,learn.opt,learn.splitter,len(learn.cbs)
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match='needs class indices|one model a peer'): learn.fit(1, cbs=JoCorCallback(models=[learn.model]))
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(64,10))
        def forward(self, x): return x.flatten(1) @ self.w
    odd = quiet(Learner(learn.dls, Odd()))
    m = odd.model
    with pytest.raises(ValueError, match='pass a factory|Pass a factory'): odd.fit(1, cbs=JoCorCallback(forget_rate=.2))
    assert odd.model is m
    with pytest.raises(ValueError, match='parameter groups'): _other_groups(learn)
    assert (learn.model,learn.opt,learn.splitter,len(learn.cbs)) == (model,opt,splitter,n)
    assert all(torch.equal(a,b) for a,b in zip(weights, model.parameters()))
    odd.fit(1, cbs=JoCorCallback(forget_rate=.2, models=Odd))
    assert odd.model.k == 2

def _other_groups(learn):
    old,learn.splitter = learn.splitter,lambda m: [[p] for p in m.parameters()]
    try: learn.fit(1, cbs=JoCorCallback(k=2, forget_rate=.1, models=[jocor_mlp(10,64), nn.Sequential(nn.Flatten(), nn.Linear(64,10))]))
    finally: learn.splitter = old

@pytest.mark.parametrize('kw,msg', [(dict(k=0),'k=0'), (dict(k=2.5),'k=2.5'), (dict(k='3'),"k='3'"), (dict(k=True),'k=True'), (dict(contrast='js'),"contrast='js'"), (dict(co_lambda=1.2),'co_lambda=1.2'),
    (dict(forget_rate=1.),'forget_rate=1.0'), (dict(forget_rate=-.1),'forget_rate=-0.1'), (dict(num_gradual=-1),'num_gradual=-1'), (dict(num_gradual=2.5),'num_gradual=2.5'), (dict(exponent=0.),'exponent=0.0'), (dict(exponent=float('nan')),'exponent=nan'), (dict(co_lambda='0.5'),"co_lambda='0.5'"), (dict(co_lambda=None),'co_lambda=None'), (dict(forget_rate='0.2'),"forget_rate='0.2'"), (dict(contrast=['kl']),'contrast='), (dict(seed=-1),'seed=-1'), (dict(init='body'),"init='body'")])
def test_bad_arguments(kw, msg):
    with pytest.raises(ValueError, match=msg): JoCorCallback(**kw)

def tensor_learner(y, model=None, loss=None, n=96):
    x = torch.randn(n,8)
    dl = DataLoader(list(zip(x, y)), bs=32, shuffle=True)
    return quiet(Learner(DataLoaders(dl, dl), model or nn.Linear(8,4), loss_func=loss or CrossEntropyLossFlat()))

@pytest.mark.parametrize('y,msg', [(torch.rand(96),'class indices'), (torch.randint(0,2,(96,3)),'class indices'), (torch.randint(4,9,(96,)),r'must lie in \[0, 4\)')])
def test_bad_targets(y, msg):
    learn = tensor_learner(y)
    m = learn.model
    with pytest.raises(ValueError, match=msg): learn.fit(1, cbs=JoCorCallback(forget_rate=.1))
    assert learn.model is m

@pytest.mark.parametrize('wrong', (-100, -1, 4))
def test_a_bad_target_in_a_later_batch(wrong):
    y = torch.randint(0,4,(96,))
    y[90] = wrong
    dl = DataLoader(list(zip(torch.randn(96,8), y)), bs=32)
    learn = quiet(Learner(DataLoaders(dl, dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))
    with pytest.raises(ValueError, match=r'must lie in \[0, 4\)'): learn.fit(1, cbs=JoCorCallback(forget_rate=.1))
    y[90] = 0
    learn.dls = DataLoaders(*[DataLoader(list(zip(torch.randn(96,8), y)), bs=32)]*2)
    learn.fit(1, cbs=JoCorCallback(forget_rate=.1))

def test_bad_loss_and_model():
    y = torch.randint(0,4,(96,))
    with pytest.raises(ValueError, match='cannot be reduced per sample'): tensor_learner(y, loss=lambda z,y: F.cross_entropy(z,y)).fit(1, cbs=JoCorCallback(forget_rate=.1))
    with pytest.raises(ValueError, match=r'logits of shape \(N, C\)'): tensor_learner(y, nn.Sequential(nn.Linear(8,4), nn.Unflatten(1,(2,2)))).fit(1, cbs=JoCorCallback(forget_rate=.1))
    dls = digits_dls(bs=5000)
    assert len(dls.train) == 1
    dls.train.drop_last = True
    with pytest.raises(ValueError, match='gives no batch'): quiet(Learner(dls, jocor_mlp(10,64))).fit(1, cbs=JoCorCallback(forget_rate=.1))

def test_plain_tensor_loaders_and_weighted_loss():
    y = torch.randint(0,4,(96,))
    cb = JoCorCallback(k=3, forget_rate=.1)
    tensor_learner(y, loss=CrossEntropyLossFlat(weight=torch.tensor([1.,2,1,1]))).fit(2, cbs=cb)
    z = torch.randn(5,4)
    w = torch.tensor([1.,2,1,1])
    loss = per_sample_loss(CrossEntropyLossFlat(weight=w), z, y[:5])
    torch.testing.assert_close(loss(z, y[:5]), F.cross_entropy(z, y[:5], weight=w, reduction='none'))

def test_torch_loaders():
    x,y = torch.randn(96,8),torch.randint(0,4,(96,))
    dl = torch.utils.data.DataLoader(list(zip(x,y)), batch_size=32, shuffle=True)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))
    learn.fit(2, cbs=(cb := JoCorCallback(k=2, forget_rate=.25)))
    assert len(cb.history) == 2 and len(learn.validate()) == 1

@pytest.mark.parametrize('mix', (MixUp, CutMix))
def test_mixing_is_refused(mix):
    learn = digits()
    model = learn.model
    with pytest.raises(ValueError, match=f'{mix.__name__} mixes'): learn.fit(1, cbs=[mix(), JoCorCallback(k=2)])
    assert learn.model is model and isinstance(learn.loss_func, CrossEntropyLossFlat)

def test_lr_find_leaves_no_row():
    learn = digits(cbs=(cb := JoCorCallback(k=2)))
    learn.lr_find(num_it=20, show_plot=False)
    learn.fit(1, 1e-3)
    assert cb.history.epoch.tolist() == [0]

def test_trying_a_batch_leaves_the_random_states_alone():
    a,b = Record(),Record()
    l1,l2 = digits(),digits()
    l1.fit(1, 1e-3, cbs=[JoCorCallback(k=2, seed=0), a]); l2.fit(1, 1e-3, cbs=b)
    assert all(torch.equal(p[1],q[1]) for p,q in zip(a.batches,b.batches))

def test_same_seed_same_weights():
    w = []
    for _ in range(2):
        learn = digits(seed=5)
        learn.fit_one_cycle(2, 1e-3, cbs=JoCorCallback(k=3))
        w.append(torch.cat([p.flatten() for p in learn.model.parameters()]))
    assert torch.equal(*w)

def test_image_folder_with_a_small_resnet(tmp_path):
    "A `vision_learner`'s model on JPEG-like files through a `DataBlock`, two workers, corrupted labels"
    from sklearn.datasets import load_digits
    d = load_digits()
    for i,(im,t) in enumerate(zip(d.images[:160], d.target[:160])):
        (tmp_path/str(t)).mkdir(exist_ok=True)
        PILImage.create(np.repeat((im*15).astype(np.uint8)[...,None],3,-1)).resize((32,32)).save(tmp_path/str(t)/f'{i}.png')
    block = DataBlock((ImageBlock, NoisyCategoryBlock(Symmetric(.3))), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.2, seed=0))
    dls = block.dataloaders(tmp_path, bs=32, num_workers=2)
    learn = quiet(vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=tmp_path))
    cb = JoCorCallback(k=2)
    learn.fit_one_cycle(2, 1e-3, cbs=cb)
    n = [len(L(params(m))) for m in learn.model.peers]
    assert [sum(len(g) for g in learn.opt.param_lists)] == [sum(n)] and len(learn.opt.param_lists) == 3
    assert cb.history.label_precision.between(0,1).all() and cb.history.kept.iloc[-1] < .75
    learn.export()
    assert load_learner(tmp_path/'export.pkl').predict(get_image_files(tmp_path)[0])[2].sum() == pytest.approx(1, abs=1e-5)

def test_a_model_that_needs_another_callback_on_its_batches():
    class ToDouble(Callback):
        order = 15
        def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)
    learn = digits(cbs=ToDouble())
    learn.model.double()
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in learn.model.parameters())
    learn = digits(cbs=ToDouble(), loss_func=lambda z,y: z.mean())
    learn.model.double()
    with pytest.raises(ValueError, match='cannot be reduced per sample'): learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))

def test_autocast_in_bfloat16():
    learn,dtypes = digits(),[]
    class See(Callback):
        order,run_valid = -4,False
        def after_pred(self): dtypes.append(self.pred.dtype)
        def after_loss(self): dtypes.append(self.learn.loss_grad.dtype)
    learn.fit(10, 1e-2, cbs=[JoCorCallback(k=2), AutocastBF16(), See()])
    assert set(dtypes[::2]) == {torch.bfloat16} and set(dtypes[1::2]) == {torch.float32} and learn.recorder.values[-1][2] > .6
    assert next(learn.model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('other', (JoCorCallback, CoTeachingCallback))
def test_two_methods_at_once_are_refused(other):
    learn = digits(cbs=other(k=2))
    model = learn.model
    with pytest.raises(ValueError, match=f'has a {other.__name__} beside this|has a JoCorCallback beside this {other.__name__}'): learn.fit(1, cbs=JoCorCallback(k=2))
    assert learn.model is model
    learn.fit(1, 1e-3)

def test_lr_find_keeps_what_was_learned_of_the_items():
    learn = digits(noise=None, cbs=(cb := JoCorCallback(k=2, forget_rate='auto', restart=True)))
    learn.fit(4, 1e-3)
    before,estimate,rows = cb.ledger,cb.estimate,cb.history
    assert estimate is not None
    learn.lr_find(num_it=15, show_plot=False)
    pd.testing.assert_frame_equal(cb.ledger, before)
    assert cb.estimate is estimate and cb.history.equals(rows) and cb.done == 4
    learn.fit(1, 1e-3)
    assert (cb.ledger.seen <= 1).all()

def test_a_callback_for_another_learner_starts_over():
    cb,new = JoCorCallback(k=2, forget_rate=.4, num_gradual=4, seed=0),JoCorCallback(k=2, forget_rate=.4, num_gradual=4, seed=0)
    digits(seed=1).fit(4, 1e-3, cbs=cb)
    with pytest.warns(UserWarning, match='has trained another model'): digits().fit(3, 1e-3, cbs=cb)
    digits().fit(3, 1e-3, cbs=new)
    pd.testing.assert_frame_equal(cb.ledger, new.ledger)
    assert cb.history.R.tolist()[4:] == new.history.R.tolist()

@pytest.mark.filterwarnings('error:.*has trained another')
def test_a_callback_goes_on_with_its_own_learner():
    learn,cb = digits(),JoCorCallback(k=2, forget_rate=.4, num_gradual=4)
    for _ in range(2): learn.fit(2, 1e-3, cbs=cb)
    assert cb.history.R.is_monotonic_increasing and cb.ledger.seen.max() == 4

def test_an_interrupted_learner_can_be_exported(tmp_path):
    learn = digits(cbs=JoCorCallback(k=2))
    learn.path = tmp_path
    stop = Stop('after_loss', KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-3, cbs=stop)
    learn.export()
    assert load_learner(tmp_path/'export.pkl').model.k == 2
    learn.fit(1, 1e-3)

def test_a_missing_number_among_the_inputs():
    x,z,y = torch.randn(96,8),torch.randn(96),torch.randint(0,4,(96,))
    z[[3,40]] = float('nan')
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(9,4)
        def forward(self, x, z): return self.l(torch.cat([x, z[:,None]], 1))
    dl = DataLoader(list(zip(x, z, y)), bs=32, shuffle=True)
    learn = quiet(Learner(DataLoaders(dl, dl), Two(), loss_func=CrossEntropyLossFlat()))
    learn.dls.n_inp = 2
    learn.fit(2, cbs=(cb := JoCorCallback(k=2, forget_rate=.1, models=Two)))
    assert cb.history.non_finite.tolist() == [2,2] and all(p.isfinite().all() for p in learn.model.parameters())

def skipping(bad, n=96, **kw):
    from fastai.data.load import SkipItemException
    x,y = torch.randn(n,8),torch.randint(0,4,(n,))
    class Items:
        def __len__(self): return n
        def __getitem__(self, i):
            if i in bad: raise SkipItemException()
            return x[i],y[i]
    return quiet(Learner(DataLoaders(DataLoader(Items(), bs=32, shuffle=True, **kw), DataLoader(list(zip(x,y)), bs=32)), nn.Linear(8,4), loss_func=CrossEntropyLossFlat()))

@pytest.mark.parametrize('kw', ({}, dict(drop_last=True), dict(num_workers=2)))
@pytest.mark.parametrize('bad', ((5,),(0,50,89)))
def test_items_that_a_loader_leaves_out(bad, kw):
    learn = skipping(bad, 90, **kw)
    with pytest.raises(ValueError, match=f"leaves out item ({'|'.join(map(str, bad))}),"): learn.fit(2, cbs=JoCorCallback(k=2, forget_rate=.1))
    assert not {'do_item','get_idxs'} & set(vars(learn.dls.train))

@pytest.mark.parametrize('n,drop_last', ((96,False),(90,False),(90,True),(20,False)))
def test_items_that_are_all_there(n, drop_last):
    learn = skipping((), n, drop_last=drop_last)
    learn.fit(2, cbs=(cb := JoCorCallback(k=2, forget_rate=.1)))
    assert len(cb.history) == 2

def test_an_epoch_that_was_cut_short():
    from fastai.callback.training import ShortEpochCallback
    learn = digits()
    learn.fit(2, 1e-3, cbs=[ShortEpochCallback(pct=.3), cb := JoCorCallback(k=2)])
    assert len(cb.history) == 2

def test_a_last_batch_that_was_cancelled():
    class Cancel(Callback):
        order = -9
        def before_batch(self):
            if self.training and self.iter == self.n_iter-1: raise CancelBatchException()
    learn = digits()
    learn.fit(2, 1e-3, cbs=[Cancel(), cb := JoCorCallback(k=2)])
    assert len(cb.history) == 2

SPAWN = """
import multiprocessing
from fastai.vision.all import *
from fastai_jocor.all import *
class Items:
    def __len__(self): return 90
    def __getitem__(self, i): return torch.full((8,), i/90), torch.tensor(i%4)
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    dls = DataLoaders(DataLoader(Items(), bs=32, shuffle=True, num_workers=2), DataLoader(Items(), bs=32))
    learn = Learner(dls, nn.Linear(8,4), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(ProgressCallback); learn.logger = noop
    learn.fit(1, cbs=(cb := JoCorCallback(k=2, forget_rate=.1)))
    assert cb.ledger.seen.tolist() == [1]*90 and cb.items.given_label.tolist() == [i%4 for i in range(90)]
"""

def test_loader_processes_that_are_not_forked(tmp_path):
    (tmp_path/'train.py').write_text(SPAWN)
    p = subprocess.run([sys.executable, '-W', 'ignore', tmp_path/'train.py'], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
