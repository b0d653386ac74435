"Events that are not those of a fit, callbacks that cancel, loaders with an order of their own."
import pytest, torch
from fastai.vision.all import (Callback, CancelBatchException, CancelEpochException, CancelTrainException, DataLoader,
    DataLoaders, Learner, SaveModelCallback, nn)
from fastai_jocor.all import Checkpoint, JoCorCallback
from fastai_jocor.peers import Peers
from learners import digits, same, weights

pytestmark = pytest.mark.filterwarnings('ignore:the peers have not learned')

# --- `tta` and `summary` send the events of a fit

def look(learn, how): return learn.summary() if how == 'summary' else learn.tta(n=1)

@pytest.mark.parametrize('how', ('summary','tta'))
def test_a_look_at_the_learner_is_no_fit(how, tmp_path):
    cb,file = JoCorCallback(k=3, restart=True),tmp_path/'checkpoint.pth'
    learn = digits(cbs=[cb, Checkpoint(file)], path=tmp_path)
    file.write_text('of an interrupted fit')
    look(learn, how)
    assert not isinstance(learn.model, Peers) and file.exists()
    file.unlink()
    learn.fit(3, 1e-2)
    before,n,told = weights(learn.model),len(cb.suspects(least=.2)),repr(cb)
    look(learn, how)
    assert same(before, weights(learn.model)) and len(cb.suspects(least=.2)) == n and repr(cb) == told
    learn.to_single()
    look(learn, how)
    assert not isinstance(learn.model, Peers)

class LookInBetween(Callback):
    order = 70
    def __init__(self, how): self.how,self.looking,self.n = how,False,0
    def after_epoch(self):
        if self.looking: return
        self.looking,self.n = True,self.n+1
        epoch = self.learn.epoch
        with torch.random.fork_rng(): look(self.learn, self.how)
        self.looking,self.learn.epoch = False,epoch # `tta` counts in it

@pytest.mark.parametrize('how', ('summary','tta'))
def test_a_look_within_a_fit(how):
    def trained(*cbs):
        learn,cb = digits(),JoCorCallback(k=2, seed=0)
        torch.manual_seed(0)
        learn.fit(3, 1e-2, cbs=[cb, *cbs])
        return weights(learn.model),cb
    (a,one),(b,two) = trained(),trained(between := LookInBetween(how))
    assert between.n == 3 and len(two.history) == 3
    if how == 'tta': assert same(a, b) and one.history.equals(two.history) # `summary` draws a batch

# --- errors and cancelled batches

class StopAt(Callback):
    order = 99
    def after_batch(self):
        if self.training and self.iter == 5: raise KeyboardInterrupt

def test_an_interrupted_lr_find_leaves_a_single_model():
    learn = digits(cbs=(cb := JoCorCallback(k=3)))
    model,opt = learn.model,learn.opt
    with learn.added_cbs(StopAt()), pytest.raises(KeyboardInterrupt): learn.lr_find(show_plot=False)
    assert learn.model is model and cb.single is None and not cb.history.size
    learn.fit(3, 1e-2)
    assert isinstance(learn.model, Peers) and len(cb.history) == 3
    model = learn.model
    learn.fit(1, 1e-2)
    assert learn.model is model and len(cb.history) == 4

class CancelIn(Callback):
    "Raise at an event of the training batch `at`, or of the first epoch"
    def __init__(self, event, error, order=50, at=1):
        self.order,self.at,self.error = order,at,error
        setattr(self, event, self.cancel)
    def cancel(self):
        if self.training and self.epoch == 0 and self.learn.iter in (self.at, None): raise self.error()

CANCELS = [('after_pred', CancelBatchException, 50, 1), ('after_pred', CancelTrainException, 50, 1),
           ('after_pred', CancelEpochException, 50, 1), ('before_batch', CancelBatchException, -20, 0)]

@pytest.mark.parametrize('event,error,order,at', CANCELS)
def test_a_cancelled_batch_leaves_no_trace(event, error, order, at):
    learn,cb = digits(),JoCorCallback(k=2)
    loss_func = learn.loss_func
    learn.fit(3, 1e-2, cbs=[cb, CancelIn(event, error, order, at)])
    assert learn.loss_func is loss_func and len(learn.validate()) == 2
    assert int((cb.items.given_label >= 0).sum()) > len(learn.dls.train_ds)-64
    learn.fit(1, 1e-2, cbs=cb)
    assert learn.loss_func is loss_func

class NoTraining(Callback):
    def before_train(self):
        if self.epoch == 0: raise CancelTrainException()

@pytest.mark.parametrize('kw', ({}, dict(rule='schedule')))
def test_an_epoch_without_training(kw):
    "As in order to validate once before"
    learn,cb = digits(),JoCorCallback(k=2, **kw)
    learn.fit(3, 1e-2, cbs=[cb, NoTraining()])
    assert len(learn.recorder.values) == 3 and len(cb.history) == 2

def test_another_callbacks_error_before_the_fit():
    learn = digits(cbs=JoCorCallback(k=2))
    with pytest.raises(Exception): learn.fit(1, 1e-3, cbs=SaveModelCallback(monitor='acuracy'))
    assert len(learn.validate()) == 2 and len(learn.metrics) == 1
    assert not {'_call_one','_with_events','selection'} & set(vars(learn))

def test_a_callback_is_in_one_learner_only():
    cb = JoCorCallback(k=2)
    a = digits(cbs=cb)
    with pytest.warns(UserWarning, match='can be in one learner only'): b = digits(cbs=cb)
    assert not any(o is cb for o in a.cbs) and any(o is cb for o in b.cbs)
    assert not hasattr(a, cb.name) and not any(o in a.cbs for o in cb.parts)
    a.fit(1, 1e-3)
    assert not isinstance(a.model, Peers) and not len(cb.history)
    b.fit(1, 1e-3)
    assert isinstance(b.model, Peers) and len(cb.history) == 1

# --- loaders

def items():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(640) % 4
    return list(zip(torch.randn(640, 4, generator=g)+3*torch.eye(4)[y], y))

class ByLabel(DataLoader):
    "Items in an order of their own"
    def sample(self): return iter(sorted(super().sample(), key=lambda i: int(self.dataset[i][1])))

class Half(Callback):
    "Half of each batch"
    order,run_valid = -20,False
    def before_batch(self): self.learn.xb,self.learn.yb = (self.x[:32],),(self.y[:32],)

def learner(dl):
    dls = DataLoaders(dl, DataLoader(items(), bs=64))
    return Learner(dls, nn.Linear(4, 4), loss_func=nn.CrossEntropyLoss())

LOADERS = [ByLabel(items(), bs=64, shuffle=True),
           DataLoader(items(), bs=64, shuffle=True, before_batch=lambda b: b[::-1])]

@pytest.mark.parametrize('dl', LOADERS)
def test_a_loader_with_another_order_than_it_says(dl):
    "Nothing is said of single items; a schedule needs none"
    told = pytest.warns(UserWarning, match='other items than its `get_idxs` says')
    with told, pytest.raises(ValueError, match='forget_rate'):
        learner(dl).fit(1, 1e-2, cbs=JoCorCallback(k=2))
    cb = JoCorCallback(k=2, forget_rate=.1)
    with pytest.warns(UserWarning, match='other items'): learner(dl).fit(2, 1e-2, cbs=cb)
    assert not cb.by_evidence and len(cb.history) == 2

def test_a_loader_as_it_should_be():
    cb = JoCorCallback(k=2)
    learner(DataLoader(items(), bs=60, shuffle=True)).fit(1, 1e-2, cbs=cb)
    assert cb.by_evidence and cb.items.given_label.tolist() == [int(y) for _,y in items()]

def test_batches_of_another_size_are_refused():
    learn = learner(DataLoader(items(), bs=64, shuffle=True))
    with pytest.raises(ValueError, match='batch 0 holds 32 items, and the loader tells of 64'):
        learn.fit(1, 1e-2, cbs=[JoCorCallback(k=2), Half()])
    assert not {'_call_one','_with_events','selection'} & set(vars(learn))
