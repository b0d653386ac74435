"`cbs=JoCorCallback(k=3)` on every kind of learner, with every trainer feature."
import copy, shutil, warnings, numpy as np, pandas as pd, pytest, torch
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
import torch.nn.functional as F
from contextlib import contextmanager
from fastai.vision.all import (Adam, BCEWithLogitsLossFlat, Callback, ChannelsLast, ClassificationInterpretation, CrossEntropyLossFlat, CSVLogger, DataBlock, DataLoader, DataLoaders, EarlyStoppingCallback,
    FocalLossFlat, GradientAccumulation, GradientClip, ImageBlock, Interpretation, LabelSmoothingCrossEntropyFlat, Learner, MultiCategoryBlock, PILImage, ProgressCallback, RandomSplitter, ReduceLROnPlateau,
    SaveModelCallback, ShowGraphCallback, TransformBlock, accuracy, accuracy_multi, get_image_files, load_learner, nn, parent_label, resnet18, set_seed, vision_learner)
from fastai.callback.data import WeightedDL
from fastai_jocor.all import *
from fastai_jocor.lab.run import fast_adam
from learners import quiet

@contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

def digits(path=None, bs=64, noise=Symmetric(.4), model=None, seed=0, **kwargs):
    set_seed(seed)
    return quiet(Learner(digits_dls(noise=noise, bs=bs), model or jocor_mlp(10, 64), path=path, **{'metrics': accuracy, **kwargs}))

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    from sklearn.datasets import load_digits
    d,tmp = load_digits(),tmp_path_factory.mktemp('pictures')
    for i,(im,t) in enumerate(zip(d.images, d.target)):
        if t > 2 or i > 400: continue
        (tmp/str(t)).mkdir(exist_ok=True)
        PILImage.create(np.repeat((im*15).astype(np.uint8)[...,None],3,-1)).resize((32,32)).save(tmp/str(t)/f'{i}.png')
    return tmp

def picture_dls(path, noise='symmetric:0.3', **kwargs):
    return DataBlock((ImageBlock, NoisyCategoryBlock(noise)), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=0)).dataloaders(path, bs=16, num_workers=0, **kwargs)

# vision_learner

def bodies():
    yield 'resnet18',resnet18
    import importlib.util
    if importlib.util.find_spec('timm'): yield 'timm','resnet10t'

@pytest.mark.parametrize('arch', [a for _,a in bodies()], ids=[n for n,_ in bodies()])
def test_vision_learner_fine_tune(pictures, arch, tmp_path):
    set_seed(0)
    single = quiet(vision_learner(picture_dls(pictures), arch, pretrained=False, metrics=accuracy, path=tmp_path))
    set_seed(0)
    learn = quiet(vision_learner(picture_dls(pictures), arch, pretrained=False, metrics=accuracy, path=tmp_path))
    for l in (single,learn): l.pretrained = True
    groups = []
    class Groups(Callback):
        order = 90
        def before_fit(self):
            groups.append(dict(lr=[h['lr'] for h in self.opt.hypers], frozen=self.opt.frozen_idx, n=[len(g) for g in self.opt.param_lists],
                on=[[p.requires_grad for p in g] for g in self.opt.param_lists], state=[[{k: v for k,v in self.opt.state[p].items() if k in ('do_wd','force_train')} for p in g] for g in self.opt.param_lists]))
    cb,model = JoCorCallback(k=2),learn.model
    with silent():
        single.fine_tune(2, 2e-3, freeze_epochs=1, cbs=Groups())
        learn.fine_tune(2, 2e-3, freeze_epochs=1, cbs=[cb, Groups()])
    one,two = groups[:2],groups[2:]
    for a,b in zip(one,two):
        assert a['lr'] == pytest.approx(b['lr']) and a['frozen'] == b['frozen'] and [2*n for n in a['n']] == b['n']
        assert [g*2 for g in a['on']] == b['on'] and [g*2 for g in a['state']] == b['state']
    assert one[0]['frozen'] > 0 and one[1]['frozen'] == 0 and any(s.get('force_train') for g in one[0]['state'] for s in g)
    assert learn.model.k == 2 and learn.model.peer(0) is model
    assert cb.history.epoch.tolist() == [0,0,1] and cb.history.R.tolist() == forget_schedule(learn.dls.noise.noise_rate, 3, default_num_gradual(3, len(learn.dls.train))).tolist()
    assert learn.get_preds()[0].shape[1] == 3

def test_the_schedule_starts_over_when_asked():
    learn = digits()
    cb,again = JoCorCallback(k=2, num_gradual=4),JoCorCallback(k=2, num_gradual=4, restart=True)
    for _ in range(2): learn.fit(3, 1e-3, cbs=cb)
    for _ in range(2): learn.fit(3, 1e-3, cbs=again)
    np.testing.assert_allclose(cb.history.R, [0,.4/3,.8/3,.4,.4,.4])
    np.testing.assert_allclose(again.history.R, [0,.4/3,.8/3]*2)
    resumed = JoCorCallback(k=2, num_gradual=4)
    learn.fit(3, 1e-3, cbs=resumed, start_epoch=1)
    learn.fit(2, 1e-3, cbs=resumed)
    np.testing.assert_allclose(resumed.history.R, [.4/3,.8/3,.4,.4])
    learn.fit(2, 1e-3, cbs=(new := JoCorCallback(k=2, num_gradual=4)))
    np.testing.assert_allclose(new.history.R, [0,.4/3])

def test_batch_norm_of_frozen_peers(pictures):
    "With train_bn the statistics of a frozen body move in every peer as in the single model; without it they stay"
    for train_bn in (True,False):
        set_seed(0)
        learn = quiet(vision_learner(picture_dls(pictures), resnet18, pretrained=False, train_bn=train_bn, cut=-4))
        learn.freeze()
        stats = lambda m: next(o for o in m[0].modules() if isinstance(o, nn.BatchNorm2d))
        w = copy.deepcopy(stats(learn.model))
        learn.fit(1, 1e-2, cbs=JoCorCallback(k=2))
        for m in learn.model.peers:
            bn = stats(m)
            assert bn.weight.requires_grad == train_bn and (not torch.equal(bn.weight, w.weight)) == train_bn
            assert not torch.equal(bn.running_mean, w.running_mean)

def weights(m): return {k: v.clone() for k,v in m.state_dict().items()}

@pytest.mark.parametrize('opt', (Adam, fast_adam))
@pytest.mark.parametrize('before', (0,1))
def test_lr_find_restores_exactly(before, opt, tmp_path):
    cb = JoCorCallback(k=2)
    learn = digits(tmp_path, cbs=cb, opt_func=opt)
    if before: learn.fit(1, 1e-3)
    learn.create_opt() if learn.opt is None else None
    model,o,splitter,w,rows = learn.model,learn.opt,learn.splitter,weights(learn.model),len(cb.history)
    state = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k,v in s.items()} for s in copy.deepcopy(o.state_dict())['state']] if opt is Adam else None
    seen = []
    class See(Callback):
        order = 61
        def after_batch(self): seen.append(isinstance(self.model, Peers))
    with learn.added_cbs(See()): res = learn.lr_find(num_it=30, show_plot=False)
    assert 1e-7 <= res.valley <= 10 and all(seen) and len(seen) > 10
    assert learn.model is model and learn.opt is o and learn.splitter is splitter and len(cb.history) == rows
    assert all(torch.equal(v, w[k]) for k,v in weights(learn.model).items())
    if state is not None:
        for a,b in zip(state, o.state_dict()['state']): assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
    learn.fit(2, 1e-3)
    assert learn.model.k == 2 and len(cb.history) == rows+2

def test_lr_find_on_peers_with_the_callback_for_the_moment():
    learn = digits()
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=3))
    w = weights(learn.model)
    with pytest.raises(RuntimeError, match=r'cbs=JoCorCallback\(k=3\)'): learn.lr_find(show_plot=False)
    with learn.added_cbs(JoCorCallback(k=3)): learn.lr_find(num_it=10, show_plot=False)
    assert all(torch.equal(v, w[k]) for k,v in weights(learn.model).items())

# precision, accumulation, clipping

def cpu_amp(monkeypatch, mode):
    "fastai's MixedPrecision with autocast and scaler on the CPU"
    import fastai.callback.fp16 as m
    monkeypatch.setattr(m, 'autocast', lambda dev, dtype: torch.autocast('cpu', dtype=dtype))
    monkeypatch.setattr(m, 'GradScaler', lambda dev, **kw: torch.amp.GradScaler('cpu', **kw))
    return (lambda learn: learn.to_bf16()) if mode=='bf16' else (lambda learn: learn.to_fp16())

@pytest.mark.parametrize('mode', ('bf16','fp16'))
def test_mixed_precision(monkeypatch, mode):
    to,seen = cpu_amp(monkeypatch, mode),[]
    class See(Callback):
        order,run_valid = -4.9,False
        def after_loss(self): seen.append((raw[-1], self.learn.loss_grad.dtype, self.learn.pred.dtype))
    raw = []
    learn = to(digits())
    hook = lambda m,i,o: raw.append(o.dtype)
    learn.model.register_forward_hook(hook)
    scaled = []
    class Scale(Callback):
        order = 12
        def before_step(self): scaled.append(self.learn.scaler.get_scale() if self.learn.scaler.is_enabled() else 1.)
    with silent(): learn.fit_one_cycle(8, 1e-2, cbs=[JoCorCallback(k=2), See(), Scale()])
    low = torch.bfloat16 if mode=='bf16' else torch.float16
    assert set(seen) == {(low, torch.float32, torch.float32)}
    assert learn.recorder.values[-1][2] > .7 and learn.model.peer(0)[1].weight.dtype == torch.float32
    assert (max(scaled) > 1) == (mode=='fp16')
    z = torch.randn(2,6,4, dtype=low)
    with torch.autocast('cpu', dtype=low):
        l = joint_loss(z, torch.arange(6)%4, .8)
    assert l.dtype == torch.float32
    torch.testing.assert_close(l, joint_loss(z.float(), torch.arange(6)%4, .8))

def test_a_scaler_skips_a_batch_of_nans(monkeypatch):
    to = cpu_amp(monkeypatch, 'fp16')
    learn = to(digits())
    class Spoil(Callback):
        order,run_valid = -6,False
        def before_batch(self):
            if self.iter == 3: self.learn.xb = (self.xb[0]*float('nan'),)
    with silent(): learn.fit(2, 1e-3, cbs=[JoCorCallback(k=2), Spoil()])
    assert all(p.isfinite().all() for p in learn.model.parameters())

def batches64(n=128, c=4):
    torch.manual_seed(0)
    return torch.randn(n,6,dtype=torch.float64),torch.randint(0,c,(n,))

def test_gradient_accumulation():
    "Four batches of 32, accumulated, are one step on the mean of their four means: each selects within itself"
    x,y = batches64()
    nets = [nn.Linear(6,4).double() for _ in range(2)]
    twins = copy.deepcopy(nets)
    dl = DataLoader(list(zip(x,y)), bs=32)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(6,4).double(), loss_func=nn.CrossEntropyLoss(), opt_func=fast_adam))
    learn.fit(3, 1e-2, cbs=[JoCorCallback(models=nets, forget_rate=.4, num_gradual=0), GradientAccumulation(128)])
    opt = torch.optim.Adam([p for m in twins for p in m.parameters()], lr=1e-2)
    for _ in range(3):
        losses = joint_loss(torch.stack([m(x) for m in twins]), y, .8).view(4,32)
        kept = losses.detach().argsort(1)[:,:int(.6*32)]
        opt.zero_grad(); losses.gather(1, kept).mean().backward(); opt.step()
    for a,b in zip(nets,twins): torch.testing.assert_close(a.weight, b.weight, atol=1e-9, rtol=0)
    whole = joint_loss(torch.stack([m(x) for m in twins]), y, .8)
    assert set(whole.argsort()[:76].tolist()) != set((whole.view(4,32).argsort(1)[:,:19]+torch.arange(4)[:,None]*32).flatten().tolist())

def test_gradient_clip_and_channels_last():
    learn = digits(model=jocor_cnn(10, 1))
    learn.dls = InMemoryDataLoaders.from_arrays(np.zeros((64,16,16),np.uint8)+np.arange(64,dtype=np.uint8)[:,None,None], np.arange(64)%10, bs=16, noise='symmetric:0.2')
    norms,layout = [],[]
    class See(Callback):
        order,run_valid = 12,False
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
        def before_batch(self): layout.append(all(p.is_contiguous(memory_format=torch.channels_last) for p in self.model.parameters() if p.ndim==4))
    learn.fit(1, 1e-2, cbs=[JoCorCallback(k=2), GradientClip(.05), ChannelsLast(), See()])
    assert norms and max(norms) <= .05+1e-5 and all(layout)

# callbacks and tools

def test_trackers_and_loggers(tmp_path):
    learn = digits(tmp_path)
    cb = JoCorCallback(k=2)
    with silent():
        learn.fit_one_cycle(6, 5e-3, cbs=[cb, SaveModelCallback(monitor='accuracy', with_opt=True), CSVLogger(), ReduceLROnPlateau(monitor='valid_loss', patience=1)])
    log = pd.read_csv(tmp_path/'history.csv')
    assert list(log.columns) == ['epoch','train_loss','valid_loss','accuracy','R','kept','agreement','label_precision','label_recall','non_finite','time'] and len(log) == 6
    np.testing.assert_allclose(log.label_precision.astype(float), cb.history.label_precision, atol=1e-6)
    best = max(v[2] for v in learn.recorder.values)
    assert learn.validate()[1] == pytest.approx(best)

def test_show_graph(capsys):
    learn = digits()
    learn.add_cb(ProgressCallback())
    learn.fit(2, 1e-3, cbs=[JoCorCallback(k=2), ShowGraphCallback()])
    assert len(learn.recorder.values) == 2
    plt.close('all')

def test_early_stopping_by_a_column_of_the_callback(tmp_path):
    learn = digits(tmp_path)
    learn.fit(20, 0., cbs=(cb := [JoCorCallback(k=2), EarlyStoppingCallback(monitor='agreement', patience=2, min_delta=.5)]))
    assert len(cb[0].history) == 3

def test_weighted_loader():
    learn = digits(noise=Symmetric(.4))
    n = len(learn.dls.train_ds)
    wgts = np.where(np.arange(n) < 100, 1., 0.)
    learn.dls.loaders[0] = learn.dls.train.new(cls=WeightedDL, wgts=wgts)
    cb,seen = JoCorCallback(k=2, num_gradual=0),[]
    class See(Callback):
        order,run_valid = -4,False
        def before_batch(self): seen.append((self.jo_cor.clean_flags[self.selection.idx], self.yb[0].clone(), np.array(self.dl._DataLoader__idxs)[self.iter*64:][:len(self.yb[0])]))
    learn.fit(2, 1e-3, cbs=[cb,See()])
    rec = learn.dls.noise
    for clean,y,idx in seen:
        assert (idx < 100).all() and (rec.noisy[idx] == y.numpy()).all() and (clean.numpy() == ~rec.flipped[idx]).all()

def test_interpretation_tta_summary_results(pictures, tmp_path):
    learn = quiet(vision_learner(picture_dls(pictures), resnet18, pretrained=False, metrics=accuracy, path=tmp_path))
    with silent(), learn.no_bar():
        learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
        preds,y = learn.get_preds()
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.confusion_matrix().sum() == len(y) and np.trace(interp.confusion_matrix()) == (preds.argmax(1)==y).sum()
        interp.plot_confusion_matrix(); interp.plot_top_losses(4); interp.most_confused()
        losses,idx = Interpretation.from_learner(learn).top_losses(3)
        want = F.nll_loss(preds.log(), y, reduction='none').sort(descending=True)
        torch.testing.assert_close(torch.as_tensor(losses).float().as_subclass(torch.Tensor), want.values[:3].as_subclass(torch.Tensor), atol=1e-4, rtol=1e-4)
        tta,_ = learn.tta(n=2)
        assert tta.shape == preds.shape and torch.allclose(tta.sum(1), torch.ones(len(tta)), atol=1e-3)
        text = str(learn.summary())
        learn.show_results(max_n=4)
        learn.show_training_loop()
    assert 'Peers' in text and 'Total params' in text
    plt.close('all')

# losses

def smooth(z, y, eps=.1):
    lp = z.log_softmax(-1)
    return (1-eps)*-lp.gather(1, y[:,None])[:,0] - eps*lp.mean(-1)

w4 = torch.tensor([1.,2.,.5,3.])
@pytest.mark.parametrize('loss,want', [
    (CrossEntropyLossFlat(weight=w4), lambda z,y: w4[y]*F.cross_entropy(z,y,reduction='none')),
    (LabelSmoothingCrossEntropyFlat(eps=.1), smooth),
    (FocalLossFlat(gamma=2.), lambda z,y: (1-z.softmax(-1).gather(1,y[:,None])[:,0])**2*F.cross_entropy(z,y,reduction='none')),
    (lambda z,y: (z.softmax(-1)-F.one_hot(y,4)).pow(2).sum(-1), lambda z,y: (z.softmax(-1)-F.one_hot(y,4)).pow(2).sum(-1)),
    (nn.CrossEntropyLoss(label_smoothing=.1), smooth)], ids=('weighted','smoothing','focal','own','torch'))
def test_losses(loss, want):
    torch.manual_seed(0)
    x,y = torch.randn(64,6),torch.randint(0,4,(64,))
    dl = DataLoader(list(zip(x,y)), bs=32)
    nets = [nn.Linear(6,4) for _ in range(3)]
    twins = copy.deepcopy(nets)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(6,4), loss_func=loss, opt_func=fast_adam))
    own = not hasattr(loss, 'reduction') and not isinstance(loss, nn.Module) and not hasattr(loss, 'func')
    class NoValid(Callback):
        def before_validate(self): raise __import__('fastai.learner').learner.CancelValidException()
    learn.fit(3, 1e-2, cbs=[JoCorCallback(k=3, models=nets, forget_rate=.25, num_gradual=0), NoValid()])
    opt = torch.optim.Adam([p for m in twins for p in m.parameters()], lr=1e-2)
    for _ in range(3):
        for xb,yb in ((x[:32],y[:32]),(x[32:],y[32:])):
            z = [m(xb) for m in twins]
            lp = [o.log_softmax(-1) for o in z]
            kl = sum((lp[i].exp()*(lp[i]-lp[j])).sum(-1) for i in range(3) for j in range(3) if i != j)
            l = .2*sum(want(o,yb) for o in z) + .8*kl/2
            kept = l.detach().argsort()[:24]
            opt.zero_grad(); l[kept].mean().backward(); opt.step()
    for a,b in zip(nets,twins): torch.testing.assert_close(a.weight, b.weight, atol=2e-5, rtol=0)

@pytest.mark.parametrize('loss', (BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat(pos_weight=torch.tensor([1.,2.,3.]))))
def test_multi_label(loss):
    torch.manual_seed(0)
    x,y = torch.randn(64,6),torch.randint(0,2,(64,3)).float()
    dl = DataLoader(list(zip(x,y)), bs=32)
    nets = [nn.Linear(6,3) for _ in range(3)]
    twins = copy.deepcopy(nets)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(6,3), loss_func=loss, opt_func=fast_adam, metrics=accuracy_multi))
    cb = JoCorCallback(k=3, models=nets, forget_rate=.25, num_gradual=0)
    learn.fit(2, 1e-2, cbs=cb)
    opt,pw = torch.optim.Adam([p for m in twins for p in m.parameters()], lr=1e-2),getattr(getattr(loss,'func',loss),'pos_weight',None)
    for _ in range(2):
        for xb,yb in ((x[:32],y[:32]),(x[32:],y[32:])):
            z = [m(xb) for m in twins]
            p = [o.sigmoid() for o in z]
            kl = sum(p[i]*(p[i]/p[j]).log() + (1-p[i])*((1-p[i])/(1-p[j])).log() for i in range(3) for j in range(3) if i != j)
            l = (.2*sum(F.binary_cross_entropy_with_logits(o,yb,reduction='none',pos_weight=pw) for o in z) + .8*kl/2).mean(-1)
            kept = l.detach().argsort()[:24]
            opt.zero_grad(); l[kept].mean().backward(); opt.step()
    for a,b in zip(nets,twins): torch.testing.assert_close(a.weight, b.weight, atol=2e-5, rtol=0)
    mean = torch.stack([m(x).sigmoid() for m in nets]).mean(0)
    got = learn.get_preds()[0]
    torch.testing.assert_close(got if isinstance(loss, BCEWithLogitsLossFlat) else got.sigmoid(), mean)
    assert learn.validate()[1] == pytest.approx(((mean>.5)==y.bool()).float().mean().item(), rel=1e-4) and 0 <= cb.history.agreement.iloc[-1] < 1

def test_multi_category_block(pictures):
    block = DataBlock((ImageBlock, MultiCategoryBlock), get_items=get_image_files, get_y=lambda f: [parent_label(f)] + (['even'] if int(f.stem)%2==0 else []), splitter=RandomSplitter(seed=0))
    learn = quiet(vision_learner(block.dataloaders(pictures, bs=16, num_workers=0), resnet18, pretrained=False, metrics=accuracy_multi))
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.1))
    with learn.no_bar(): assert learn.predict(get_image_files(pictures)[0])[2].shape == (4,)

@pytest.mark.parametrize('loss,y,msg', [(lambda z,y: F.cross_entropy(z,y), torch.randint(0,4,(64,)), 'cannot be reduced per sample'),
    (BCEWithLogitsLossFlat(), torch.randint(0,2,(64,3)).float(), 'do not fit logits'), (CrossEntropyLossFlat(), torch.rand(64,4), 'must be class indices')])
def test_losses_that_are_refused(loss, y, msg):
    dl = DataLoader(list(zip(torch.randn(64,6),y)), bs=32)
    learn = quiet(Learner(DataLoaders(dl,dl), nn.Linear(6,4), loss_func=loss))
    model = learn.model
    with pytest.raises(ValueError, match=msg): learn.fit(1, cbs=JoCorCallback(k=2, forget_rate=.1))
    assert learn.model is model

# text, tables, several inputs

def same_after_export(learn, path, item, tmp_path):
    with silent(), learn.no_bar():
        want = learn.predict(item)
        learn.path = tmp_path
        learn.export('e.pkl')
        loaded = load_learner(tmp_path/'e.pkl')
        with loaded.no_bar(): got = loaded.predict(item)
    assert isinstance(loaded.model, Peers)
    torch.testing.assert_close(torch.as_tensor(got[2]), torch.as_tensor(want[2]))
    assert torch.as_tensor(want[2]).sum() == pytest.approx(1, abs=1e-4)

class Words:
    def __call__(self, items): return (str(o).split() for o in items)

def test_text_learner(tmp_path):
    from fastai.text.all import AWD_LSTM, TextBlock, ColReader, text_classifier_learner, awd_lstm_clas_config
    rs = np.random.RandomState(0)
    df = pd.DataFrame([(' '.join(rs.permutation(['so','it','was']+[w]*2+list('abcdef')[:rs.randint(6)])),lab) for w,lab in (('good','pos'),('bad','neg')) for _ in range(100)], columns=['words','label'])
    block = DataBlock((TextBlock.from_df('words', tok=Words(), min_freq=1), NoisyCategoryBlock('symmetric:0.2')), get_x=ColReader('text'), get_y=ColReader('label'), splitter=RandomSplitter(seed=0))
    set_seed(0)
    dls = block.dataloaders(df, bs=16, num_workers=0, path=tmp_path)
    config = {**awd_lstm_clas_config, 'emb_sz': 24, 'n_hid': 32, 'n_layers': 2}
    learn = quiet(text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, metrics=accuracy, drop_mult=.1))
    cb = JoCorCallback(k=3)
    with silent(): learn.fit_one_cycle(8, 1e-2, cbs=cb)
    assert learn.recorder.values[-1][2] > .9 and cb.history.label_precision.iloc[-1] > .85
    raw = [m[0].module.rnns[0].weight_hh_l0_raw for m in learn.model.peers]
    assert not torch.equal(raw[0], raw[1])
    stds = [m[0].module.encoder.weight.std() for m in quiet(text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False)).to_peers(3, seed=1).model.peers]
    assert max(stds)/min(stds) < 1.3
    same_after_export(learn, tmp_path, 'so it was good', tmp_path)

def test_tabular_learner(tmp_path):
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, tabular_learner
    rs = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rs.choice(list('pqr'), 600), x=rs.randn(600)))
    df['y'] = np.where((df.x > 0) ^ (df.a == 'p'), 'yes', 'no')
    to = TabularPandas(df, [Categorify,FillMissing,Normalize], ['a'], ['x'], 'y', y_block=NoisyCategoryBlock('symmetric:0.3'), splits=RandomSplitter(seed=0)(df))
    set_seed(0)
    learn = quiet(tabular_learner(to.dataloaders(bs=32, path=tmp_path), layers=[30], metrics=accuracy))
    cb = JoCorCallback(k=3)
    with silent(): learn.fit_one_cycle(10, 1e-2, cbs=cb)
    assert learn.recorder.values[-1][2] > .85 and cb.history.label_precision.iloc[-1] > .8
    rec,seen = learn.dls.noise,[]
    class See(Callback):
        order,run_valid = -4,False
        def before_batch(self): seen.append((self.jo_cor.clean_flags[self.selection.idx], np.array(self.dl._DataLoader__idxs)[self.iter*32:][:len(self.yb[0])], self.yb[0].flatten().numpy()))
    with silent(): learn.fit(1, cbs=[JoCorCallback(k=3), See()])
    for clean,idx,y in seen: assert (rec.noisy[idx] == y).all() and (clean.numpy() == ~rec.flipped[idx]).all()
    same_after_export(learn, tmp_path, df.iloc[0], tmp_path)

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4,8),nn.Linear(3,8); self.out = nn.Linear(8,2)
    def forward(self, x, z): return self.out(F.relu(self.a(x)+self.b(z)))

def test_several_inputs(tmp_path):
    torch.manual_seed(0)
    x,z = torch.randn(200,4),torch.randn(200,3)
    y = (x[:,0]+z[:,0]>0).long()
    block = DataBlock((TransformBlock, TransformBlock, NoisyCategoryBlock('symmetric:0.1')), n_inp=2, getters=[lambda i: x[i], lambda i: z[i], lambda i: int(y[i])], splitter=RandomSplitter(seed=0))
    dls = block.dataloaders(range(200), bs=20, num_workers=0)
    bad = dls.train_ds.items[3]
    learn = quiet(Learner(dls, TwoInputs(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path))
    x[bad] = float('nan')
    cb = JoCorCallback(k=3)
    learn.fit(20, 3e-2, cbs=cb)
    assert cb.history.non_finite.tolist() == [1]*20 and all(p.isfinite().all() for p in learn.model.parameters())
    v = list(dls.valid_ds.items)
    preds = learn.get_preds()[0]
    assert learn.validate()[1] > .8
    learn.export()
    with silent(): loaded = load_learner(tmp_path/'export.pkl')
    torch.testing.assert_close(loaded.model(x[v],z[v]).softmax(-1), preds.as_subclass(torch.Tensor))

# export

def test_export_where_the_data_are_gone(pictures, tmp_path):
    mine = tmp_path/'pics'; shutil.copytree(pictures, mine)
    item = tmp_path/'new.png'; shutil.copy(get_image_files(mine)[0], item)
    learn = quiet(vision_learner(picture_dls(mine), resnet18, pretrained=False, path=tmp_path))
    with silent(), learn.no_bar():
        learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
        want = learn.predict(item)
        peers = [m for m in learn.model.peers]
        learn.export('mean.pkl')
        x = learn.dls.test_dl([item]).one_batch()[0]
        single = peers[1].eval()(x).softmax(-1)[0]
        learn.to_single(1).export('one.pkl')
        shutil.rmtree(mine)
        for name,p in (('mean.pkl',want[2]),('one.pkl',single)):
            loaded = load_learner(tmp_path/name)
            with loaded.no_bar(): got = loaded.predict(item)
            torch.testing.assert_close(torch.as_tensor(got[2]), p.as_subclass(torch.Tensor), atol=1e-5, rtol=1e-4)
    assert not isinstance(loaded.model, Peers)

def test_to_single_trains_on():
    learn = digits()
    with pytest.raises(ValueError, match='single'): learn.to_single(0)
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=3))
    m = learn.model.peer(2)
    with pytest.raises(ValueError, match='i=3'): learn.to_single(3)
    learn.to_single(2).fit(1, 1e-3)
    assert learn.model is m and len(learn.opt.param_lists[0]) == 4

def test_torch_export():
    for make,x in ((lambda: jocor_cnn(5,3),torch.randn(4,3,32,32)), (lambda: jocor_mlp(10,64),torch.randn(4,1,8,8))):
        peers = make_peers(make, 3).eval()
        with silent(): program = torch.export.export(peers, (x,), dynamic_shapes=(({0: torch.export.Dim('batch', min=2)},),))
        for n in (4,7):
            x = torch.randn(n, *x.shape[1:])
            torch.testing.assert_close(program.module()(x), peers(x), atol=1e-5, rtol=0)
            torch.testing.assert_close(program.module()(x).exp().sum(-1), torch.ones(n), atol=1e-5, rtol=0)

def test_onnx(tmp_path):
    pytest.importorskip('onnxscript', reason="torch's ONNX exporter (onnxscript) is not installed")
    ort = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    peers,x = make_peers(lambda: jocor_mlp(10,64), 3).eval(),torch.randn(4,1,8,8)
    with silent(): torch.onnx.export(peers, (x,), tmp_path/'peers.onnx', dynamo=True)
    out = ort.InferenceSession(str(tmp_path/'peers.onnx')).run(None, {ort.InferenceSession(str(tmp_path/'peers.onnx')).get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.as_tensor(out), peers(x), atol=1e-5, rtol=0)
