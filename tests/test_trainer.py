"`cbs=JoCorCallback(k=3)` beside what fastai's trainer can do: schedules, precision, accumulation, trackers, losses."
import copy, warnings, pytest, torch
import numpy as np, pandas as pd
import torch.nn.functional as F
from contextlib import contextmanager
from fastai.vision.all import (Adam, BCEWithLogitsLossFlat, Callback, CancelValidException, ChannelsLast,
    CrossEntropyLossFlat, CSVLogger, EarlyStoppingCallback, FocalLossFlat, GradientAccumulation, GradientClip,
    LabelSmoothingCrossEntropyFlat, ProgressCallback, ReduceLROnPlateau, SaveModelCallback, ShowGraphCallback,
    accuracy_multi, nn)
from fastai.callback.data import WeightedDL
from fastai_jocor.all import *
from fastai_jocor.losses import joint_loss
from fastai_jocor.peers import Peers
from learners import Record, digits, digits64, fast_adam, finite, plain, same, tensors, weights
import reference

COLUMNS = ['R','kept','agreement','noise_low','noise_high','label_precision','label_recall']

@contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

# --- schedules

def test_the_schedule_starts_over_when_asked():
    learn = digits(Symmetric(.4))
    cb,again = JoCorCallback(k=2, num_gradual=4),JoCorCallback(k=2, num_gradual=4, restart=True)
    for _ in range(2): learn.fit(3, 1e-3, cbs=cb)
    for _ in range(2): learn.fit(3, 1e-3, cbs=again)
    np.testing.assert_allclose(cb.history.R, [0,.4/3,.8/3,.4,.4,.4])
    np.testing.assert_allclose(again.history.R, [0,.4/3,.8/3]*2)

def test_the_schedule_of_a_fit_that_skips_epochs():
    learn = digits(Symmetric(.4))
    cb,new = JoCorCallback(k=2, num_gradual=4),JoCorCallback(k=2, num_gradual=4)
    learn.fit(3, 1e-3, cbs=cb, start_epoch=1)
    learn.fit(2, 1e-3, cbs=cb)
    np.testing.assert_allclose(cb.history.R, [.4/3,.8/3,.4,.4])
    learn.fit(2, 1e-3, cbs=new)
    np.testing.assert_allclose(new.history.R, [0,.4/3])

# --- the learning rate finder

def state_of(opt): return [dict(s) for s in copy.deepcopy(opt.state_dict())['state']]

def same_states(a, b):
    for s,t in zip(a, b):
        for name,o in s.items():
            if not (torch.equal(o, t[name]) if isinstance(o, torch.Tensor) else o == t[name]): return False
    return True

class PeersAtWork(Callback):
    "Whether peers are trained in each batch"
    order = 61
    def __init__(self): self.seen = []
    def after_batch(self): self.seen.append(isinstance(self.model, Peers))

@pytest.mark.parametrize('opt_func', (Adam, fast_adam), ids=('fastai','torch'))
@pytest.mark.parametrize('before', (0,1))
def test_lr_find_restores_exactly(before, opt_func, tmp_path):
    cb,see = JoCorCallback(k=2),PeersAtWork()
    learn = digits(path=tmp_path, cbs=cb, opt_func=opt_func)
    if before: learn.fit(1, 1e-3)
    else: learn.create_opt()
    model,opt,splitter = learn.model,learn.opt,learn.splitter
    own,rows = weights(model),len(cb.history)
    state = state_of(opt) if opt_func is Adam else None
    with learn.added_cbs(see): found = learn.lr_find(num_it=30, show_plot=False)
    assert 1e-7 <= found.valley <= 10 and all(see.seen) and len(see.seen) > 10
    assert learn.model is model and learn.opt is opt and learn.splitter is splitter and len(cb.history) == rows
    assert same(own, weights(learn.model))
    if state is not None: assert same_states(state, state_of(opt))
    learn.fit(2, 1e-3)
    assert learn.model.k == 2 and len(cb.history) == rows+2

def test_lr_find_on_peers_with_the_callback_for_the_moment():
    learn = digits()
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=3))
    own = weights(learn.model)
    with pytest.raises(RuntimeError, match=r'cbs=JoCorCallback\(k=3\)'): learn.lr_find(show_plot=False)
    with learn.added_cbs(JoCorCallback(k=3)): learn.lr_find(num_it=10, show_plot=False)
    assert same(own, weights(learn.model))

# --- precision, accumulation, clipping

def cpu_amp(monkeypatch, mode):
    "fastai's MixedPrecision with autocast and scaler on the CPU"
    import fastai.callback.fp16 as m
    monkeypatch.setattr(m, 'autocast', lambda dev, dtype: torch.autocast('cpu', dtype=dtype))
    monkeypatch.setattr(m, 'GradScaler', lambda dev, **kw: torch.amp.GradScaler('cpu', **kw))
    return (lambda learn: learn.to_bf16()) if mode == 'bf16' else (lambda learn: learn.to_fp16())

class Types(Callback):
    "The types of the loss and the prediction after each batch, and the scale of the loss"
    order,run_valid = 12,False
    def __init__(self): self.types,self.scales = set(),[]
    def after_backward(self): self.types.add((self.learn.loss.dtype, self.learn.pred.dtype))
    def before_step(self):
        scaler = self.learn.scaler
        self.scales.append(scaler.get_scale() if scaler.is_enabled() else 1.)

@pytest.mark.parametrize('mode,low', (('bf16',torch.bfloat16), ('fp16',torch.float16)))
def test_mixed_precision(monkeypatch, mode, low):
    if torch.cuda.is_available(): pytest.skip('lets a CPU do what a GPU does')
    learn,types,raw = cpu_amp(monkeypatch, mode)(digits()),Types(),[]
    learn.model.register_forward_hook(lambda m,i,o: raw.append(o.dtype) if m.training else None)
    with silent(): learn.fit_one_cycle(8, 1e-2, cbs=[JoCorCallback(k=2), types])
    assert set(raw) == {low} and types.types == {(torch.float32, torch.float32)}
    assert learn.recorder.values[-1][2] > .4 and learn.model.peer(0)[1].weight.dtype == torch.float32
    assert (max(types.scales) > 1) == (mode == 'fp16')

@pytest.mark.parametrize('low', (torch.bfloat16, torch.float16))
def test_the_loss_is_computed_in_float32(low):
    z,y = torch.randn(2, 6, 4, dtype=low),torch.arange(6) % 4
    with torch.autocast('cpu', dtype=low): loss = joint_loss(z, y, .8)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, joint_loss(z.float(), y, .8))

class Spoil(Callback):
    "One batch of NaNs"
    order,run_valid = -20,False
    def before_batch(self):
        if self.iter == 3: self.learn.xb = (self.xb[0]*float('nan'),)

def test_a_scaler_skips_a_batch_of_nans(monkeypatch):
    learn = cpu_amp(monkeypatch, 'fp16')(digits())
    with silent(): learn.fit(2, 1e-3, cbs=[JoCorCallback(k=2), Spoil()])
    assert finite(learn.model)

def normal64(n=128, c=4): return torch.randn(n, 6, dtype=torch.float64),torch.randint(0, c, (n,))
def linear64(k, c=4): return [nn.Linear(6, c).double() for _ in range(k)]

def test_gradient_accumulation():
    "Four batches of 32, accumulated, are one step on the mean of their four means: each selects within itself"
    (x,y),nets = normal64(),linear64(2)
    twins = copy.deepcopy(nets)
    learn = tensors(x, y, linear64(1)[0])
    cb = JoCorCallback(models=nets, forget_rate=.4, num_gradual=0, rounding='official')
    learn.fit(3, 1e-2, cbs=[cb, GradientAccumulation(128)])
    opt = reference.adam(twins, 1e-2)
    for _ in range(3):
        losses = reference.joint_losses([m(x) for m in twins], y)
        means = [part[reference.smallest(part, .4)].mean() for part in losses.split(32)]
        reference.step(opt, sum(means)/4)
    reference.assert_same_weights(nets, twins)
    losses = reference.joint_losses([m(x) for m in twins], y).detach()
    each = {int(i)+32*b for b,part in enumerate(losses.split(32)) for i in reference.smallest(part, .4)}
    assert each != set(reference.smallest(losses, .4).tolist())

class See(Callback):
    "The norm of the gradient, and whether the weights lie channels last"
    order,run_valid = 12,False
    def __init__(self): self.norms,self.layout = [],[]
    def before_step(self):
        self.norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
    def before_batch(self):
        kernels = [p for p in self.model.parameters() if p.ndim == 4]
        self.layout.append(all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels))

def test_gradient_clip_and_channels_last():
    learn,see = digits(model=jocor_cnn(10, 1)),See()
    images = np.zeros((64,16,16), np.uint8) + np.arange(64, dtype=np.uint8)[:,None,None]
    learn.dls = InMemoryDataLoaders.from_arrays(images, np.arange(64) % 10, bs=16, noise='symmetric:0.2')
    clip = GradientClip(.05)
    learn.fit(1, 1e-2, cbs=[JoCorCallback(k=2), clip, ChannelsLast(), see])
    limit = .05*2**.5 # .05 for each of two
    assert see.norms and .05 < max(see.norms) <= limit+1e-5 and all(see.layout) and clip.max_norm == .05

# --- callbacks and tools

def test_trackers_and_loggers(tmp_path):
    learn,cb = digits(path=tmp_path),JoCorCallback(k=2)
    save = SaveModelCallback(monitor='accuracy', with_opt=True)
    plateau = ReduceLROnPlateau(monitor='valid_loss', patience=1)
    with silent(): learn.fit_one_cycle(6, 5e-3, cbs=[cb, save, CSVLogger(), plateau])
    log = pd.read_csv(tmp_path/'history.csv')
    assert list(log.columns) == ['epoch','train_loss','valid_loss','accuracy',*COLUMNS,'time'] and len(log) == 6
    np.testing.assert_allclose(log.label_precision.astype(float), cb.history.label_precision, atol=1e-6)
    best = max(v[2] for v in learn.recorder.values)
    assert learn.validate()[1] == pytest.approx(best)

def test_show_graph(capsys):
    learn = digits()
    learn.add_cb(ProgressCallback())
    learn.fit(2, 1e-3, cbs=[JoCorCallback(k=2), ShowGraphCallback()])
    assert len(learn.recorder.values) == 2

def test_early_stopping_by_a_column_of_the_callback(tmp_path):
    learn,cb = digits(path=tmp_path),JoCorCallback(k=2)
    learn.fit(20, 0., cbs=[cb, EarlyStoppingCallback(monitor='agreement', patience=2, min_delta=.5)])
    assert len(cb.history) == 3

class Items(Callback):
    "Which items are in each batch, as the callback sees it"
    order,run_valid = 20,False
    def __init__(self): self.found = []
    def before_batch(self): self.found.append(self.learn.selection.idx.numpy().copy())

def test_weighted_loader():
    learn,rec,see = digits64(),Record(),Items()
    n = len(learn.dls.train.dataset)
    wgts = np.where(np.arange(n) < 100, 1., 0.)
    learn.dls.loaders[0] = WeightedDL(learn.dls.train.dataset, bs=64, shuffle=True, wgts=wgts)
    learn.fit(2, 1e-3, cbs=[JoCorCallback(k=2, num_gradual=0), rec, see])
    for mine,idx in zip(rec.items(learn), see.found, strict=True): assert (mine == idx).all() and (idx < 100).all()

class Average(Callback):
    "timm's moving average of the weights, as its users keep it"
    order = 7
    def __init__(self, make): self.make,self.ema = make,None
    def after_step(self):
        if self.ema is None: self.ema = self.make(self.model)
        self.ema.update(self.model)

@pytest.mark.parametrize('name', ('ModelEmaV2','ModelEmaV3'))
def test_moving_averages_of_the_weights(name, tmp_path):
    "They walk `state_dict()`, and so does safetensors: it holds tensors alone, in a fit too"
    ema = getattr(pytest.importorskip('timm.utils'), name)
    safetensors = pytest.importorskip('safetensors.torch')
    learn,average = digits(path=tmp_path),Average(lambda m: ema(m, decay=.9))
    learn.fit(3, 1e-2, cbs=[JoCorCallback(k=2), Checkpoint(), average])
    for a,b in zip(average.ema.module.parameters(), learn.model.parameters()):
        assert a.isfinite().all() and not torch.equal(a, b)
    safetensors.save_file(learn.model.state_dict(), tmp_path/'peers.safetensors')
    loaded = safetensors.load_file(tmp_path/'peers.safetensors')
    assert all(torch.equal(o.cpu(), loaded[key]) for key,o in learn.model.state_dict().items())

# --- losses

def smooth(z, y, eps=.1):
    lp = z.log_softmax(-1)
    return (1-eps)*-lp.gather(1, y[:,None])[:,0] - eps*lp.mean(-1)

def focal(z, y): return (1-z.softmax(-1).gather(1, y[:,None])[:,0])**2*reference.cross_entropy(z, y)
def brier(z, y): return (z.softmax(-1)-F.one_hot(y, 4)).pow(2).sum(-1)

W4 = torch.tensor([1.,2.,.5,3.], dtype=torch.float64)

LOSSES = dict(weighted=(nn.CrossEntropyLoss(weight=W4), reference.cross_entropy),
    smoothing=(LabelSmoothingCrossEntropyFlat(eps=.1), smooth), torch=(nn.CrossEntropyLoss(label_smoothing=.1), smooth),
    focal=(FocalLossFlat(gamma=2.), focal), own=(brier, brier))

class NoValidation(Callback):
    "Some of the losses have no mean to validate by"
    def before_validate(self): raise CancelValidException()

@pytest.mark.parametrize('name', LOSSES)
def test_losses(name):
    (x,y),nets,(loss,want) = normal64(64),linear64(3),LOSSES[name]
    twins = copy.deepcopy(nets)
    learn,rec = tensors(x, y, linear64(1)[0], loss_func=loss),Record()
    cb = JoCorCallback(k=3, models=nets, forget_rate=.25, num_gradual=0)
    learn.fit(3, 1e-2, cbs=[cb, rec, NoValidation()])
    reference.train(twins, rec.batches, [.25]*3, 1e-2, lambda zs,y: reference.joint_losses(zs, y, loss=want),
        W4 if name == 'weighted' else None)
    reference.assert_same_weights(nets, twins)
    assert len(cb.history) == 3

W3 = torch.tensor([1.,2.,3.], dtype=torch.float64)

@pytest.mark.parametrize('loss,pos_weight', ((BCEWithLogitsLossFlat(), None), (nn.BCEWithLogitsLoss(), None),
    (BCEWithLogitsLossFlat(pos_weight=W3), W3)))
def test_several_labels_an_item(loss, pos_weight):
    x,y,nets = torch.randn(64, 6, dtype=torch.float64),torch.randint(0, 2, (64,3)).double(),linear64(3, 3)
    twins = copy.deepcopy(nets)
    learn,rec = tensors(x, y, linear64(1, 3)[0], loss_func=loss, metrics=accuracy_multi),Record()
    cb = JoCorCallback(k=3, models=nets, forget_rate=.25, num_gradual=0)
    learn.fit(2, 1e-2, cbs=[cb, rec])
    bce = lambda z,y: F.binary_cross_entropy_with_logits(z, y, reduction='none', pos_weight=pos_weight)
    mean = lambda zs,y: reference.joint_losses(zs, y, loss=bce, divergence=reference.kl_of_labels).mean(-1)
    reference.train(twins, rec.batches, [.25]*2, 1e-2, mean)
    reference.assert_same_weights(nets, twins)
    want = torch.stack([m(x).sigmoid() for m in nets]).mean(0)
    got = learn.get_preds()[0]
    if not isinstance(loss, BCEWithLogitsLossFlat): got = got.sigmoid()
    torch.testing.assert_close(plain(got).double(), want.detach(), atol=1e-5, rtol=1e-5)
    right = ((want > .5) == y.bool()).double().mean().item()
    assert learn.validate()[1] == pytest.approx(right, rel=1e-4) and 0 <= cb.history.agreement.iloc[-1] < 1

REFUSED = [(lambda z,y: F.cross_entropy(z,y), torch.randint(0,4,(64,)), 'cannot be reduced per sample'),
    (BCEWithLogitsLossFlat(), torch.randint(0,2,(64,3)).float(), 'do not fit logits'),
    (CrossEntropyLossFlat(), torch.rand(64,4), 'must be class indices')]

@pytest.mark.parametrize('loss,y,msg', REFUSED)
def test_losses_that_are_refused(loss, y, msg):
    learn = tensors(torch.randn(64,6), y, nn.Linear(6,4), loss_func=loss)
    model = learn.model
    with pytest.raises(ValueError, match=msg): learn.fit(1, cbs=JoCorCallback(k=2, forget_rate=.1))
    assert learn.model is model
