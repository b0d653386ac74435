"The evidence rule, written out: one item after the other, in numpy and float64."
import math, numpy as np, torch
import reference

def softmax(z):
    p = np.exp(z-z.max(-1, keepdims=True))
    return p/p.sum(-1, keepdims=True)

class Rule:
    "What a fit knows of its items, and what it makes of it"
    def __init__(self, hidden, k, n_classes, tau=None, by_margin=True):
        self.hidden,self.k,self.C = [int(o) for o in hidden],k,n_classes
        self.tau,self.looks = tau,by_margin
        self.margin = {}
        self.mean,self.votes,self.labels = np.full((3,n_classes), 1/n_classes)
        self.brake = self.owed = 0.
        self.voted = {} # of a single network, in the epoch before
        self.rows,self.by_margin,self.by_floor,self.voted_for = [],0,0,0
        self.means,self.held_fast = {},0.

    @property
    def best(self):
        none = dict(out=0, rate=0, low=0, high=1, sure=1, n=1)
        return max(self.rows, key=lambda o: o['out'], default=none)
    @property
    def U(self): return self.best['high'] if self.tau is None else self.tau
    @property
    def credit(self):
        "Do contradictions count? Not where sure votes are right or nothing is memorised, unless memorising harms"
        if self.tau is not None or not self.rows: return 1
        flat,row,best,n = self.flat,self.rows[-1],self.best['out'],self.rows[-1]['n']
        error = 2*math.sqrt(max(best*(1-best), 1/n)/max(n/2, 1))
        harm = np.clip((best-row['out']-error)/.01, 0, 1)
        if flat < .5: return harm
        sure = min((flat-.5)/.2, 1)*np.clip(max((flat-.75)/.15, (row['inside']-row['out']-.01)/.04), 0, 1)
        return max(sure, harm)

    @property
    def flat(self): return flat_of(self.rows)
    @property
    def limit(self):
        "The upper end; nearer to the guess less a standard error, the fewer labels, and the better surer votes fit"
        if self.tau is not None: return self.tau
        b = self.best
        hard = np.clip((1-b['out']-b['sure'])/.1, 0, 1)*max(1-b['n']/1000, 0)
        error = math.sqrt(max(b['sure']*(1-b['sure']), 1/b['n'])/max(b['n']/2, 1))
        return self.credit*((1-hard)*b['high']+hard*max(b['rate']-error, 0))
    @property
    def alike(self): return self.rows[-1]['alike'] if self.rows else 0

    @property
    def threshold(self):
        if not self.looks or self.alike < .25: return math.inf
        U = min(max(self.U*self.credit, .005), .995)
        doubt = max(math.log((1-self.alike)/self.alike), 0) if self.alike < 1 else 0
        return max(1.5, 2+math.log((1-U)/U))+doubt

    @property
    def R(self):
        if len(self.rows) < 2: return self.brake
        guess,best = self.tau,self.best
        if guess is None: # of less than 250 hidden labels, it is nearer to the lower end
            guess = best['rate']-(best['rate']-best['low'])*np.clip((250-best['n'])/100, 0, 1)
        return max(self.brake, self.credit*guess*np.clip((self.alike-.7)/.2, 0, 1))

    @property
    def lam(self): return .8*np.clip((self.rows[-1]['against']-.3)/.3, 0, 1) if self.rows else 0

    def margin_of(self, p, y):
        even = np.clip((self.labels.min()*self.C-.4)/.2, 0, 1) if self.C > 2 else 0
        q = np.log(p)-even*np.log(np.maximum(self.mean, 1e-4))
        return q.max()-q[y]

    def judge(self, zs, y, idx):
        "Margins of a batch's items, as far as they count, from logits (k, N, C)"
        p = softmax(zs).mean(0)
        C = range(self.C)
        best = p.argmax(-1)
        self.mean = .95*self.mean + .05*p.mean(0)
        self.votes = .95*self.votes + .05*np.array([np.mean(best == c) for c in C])
        self.labels = .95*self.labels + .05*np.array([np.mean(y == c) for c in C])
        by = []
        for p_i,y_i,i in zip(p, y, idx):
            now = self.margin_of(p_i, y_i)
            self.margin[i] = (self.margin[i]+now)/2 if i in self.margin else now
            share = self.votes[y_i]/max(self.labels[y_i], 1e-6)
            common = np.clip((self.labels[y_i]*self.C-.4)/.2, 0, 1)
            least,enough = .25-.15*common,.75-.35*common
            by.append(self.margin[i]*np.clip((share-least)/(enough-least), 0, 1))
        return by

    def keep(self, by, idx):
        "Places of the items that are kept"
        n = int(self.owed+self.R*len(by)+1e-6)
        n = min(n, len(by)-1)
        self.owed = min(self.owed+self.R*len(by)-n, len(by))
        may = [j for j in range(len(by)) if self.k > 1 or self.hidden[idx[j]] < 0]
        above = {j for j in may if by[j] > self.threshold}
        floor = {j for j in sorted(may, key=lambda j: -by[j])[:n] if by[j] > 0}
        self.by_margin += len(above)
        self.by_floor += len(floor-above)
        kept = [j for j in may if j not in above|floor]
        return kept or [min(may, key=lambda j: by[j])]

    def close(self, seen):
        "The interval after an epoch, from `(position, logits (k, C), label)` of each item"
        hidden,others,voted = [],[],{}
        for i,z,y in seen:
            best,peer = z.argmax(-1),self.hidden[i]
            if peer < 0:
                others.append(softmax(z).mean(0).argmax() == y)
                voted[i] = best[0]
                continue
            p,twins = softmax(z[peer]),[best[m] for m in range(self.k) if m != peer]
            if self.k == 1: twins = [self.voted.get(i, -1)]
            hidden.append(dict(y=y, vote=best[peer], conf=p.max(), out=best[peer] == y, inside=np.mean(twins == y),
                               alike=np.mean(twins == best[peer]), against=self.margin_of(p, y) > self.threshold))
            voted[i] = best[0]
        row = {name: np.mean([o[name] for o in hidden]) for name in ('out','inside','alike','against')}
        if self.k == 1: row['inside'] = np.mean(others)
        self.voted = voted
        self.rows.append(row | wrong(hidden, row['out'], row['alike'], self.rows))
        self.rows[-1]['cut'] = cut_of(hidden, self.rows[-1]['sure'])
        if len(self.rows) > 1:
            now,before = self.rows[-1],self.rows[max(len(self.rows)-3, 0)]
            growth = max(now['out']-before['out'], 0)
            press = max(now['inside']-now['out']-.01-1.5*growth, 0)
            self.brake = min(self.limit, self.brake+min(.25, 2*press*len(hidden)/(len(hidden)+100)))
            sure,n = self.best['sure'],len(hidden)
            if self.tau is None and sure <= 2*math.sqrt(max(sure*(1-sure), 1/n)/max(n/2, 1)): self.brake = 0
        return self.best['low'],self.best['high']

def flat_of(rows):
    "By what factor the surest votes of all are contradicted less than the surest half, over three epochs"
    sure = sum(o['sure'] for o in rows[-3:])
    return sum(o['floor'] for o in rows[-3:])/sure if sure else 1

def errors_of(hidden, share):
    "The share of labels that the surest votes for each class contradict"
    wrong = 0
    for c in {o['vote'] for o in hidden}:
        votes = sorted([o for o in hidden if o['vote'] == c], key=lambda o: -o['conf'])
        wrong += np.mean([o['y'] != c for o in votes[:max(int(len(votes)*share), 1)]])*len(votes)/len(hidden)
    return wrong

def floor_of(hidden, half):
    "Where the line through the errors of the surest half and of a smaller part ends, and a standard error"
    part = np.clip(90/len(hidden), .1, .5)
    if part > .4: return half
    few = errors_of(hidden, part)
    line = np.polynomial.Polynomial.fit([part/2, .25], [few, half], 1)
    error = math.sqrt(max(few*(1-few), 1/(part*len(hidden)))/(part*len(hidden)))
    return line(0)+error*.25/(.25-part/2)

def wrong(hidden, out, alike, rows):
    "How many labels are wrong, from the surest half of the votes for each class"
    surest = errors_of(hidden, .5)
    own = dict(sure=surest, floor=floor_of(hidden, surest))
    flat = flat_of([*rows, own])
    gap = max(1-out-surest, 0)
    error = 2*math.sqrt(max(surest*(1-surest), 1/len(hidden))/max(len(hidden)/2, 1))
    high = min(min(1-out, surest+.25*gap+.03)+error, 1)
    low = np.clip((alike-.5)/.3, 0, 1)*np.clip((flat-.5)/.2, 0, 1)*np.clip(surest-.75*gap-error, 0, high)
    return dict(rate=min(max(surest-.2*gap, low), high), low=low, high=high, n=len(hidden)) | own

def cut_of(hidden, sure):
    "The least confidence from which on at least 50 votes are right, 95 in 100 of them, as far as labels can tell"
    enough = [math.inf]
    for conf in {np.float32(o['conf']) for o in hidden}:
        above = [o['out'] for o in hidden if np.float32(o['conf']) >= conf]
        if len(above) >= 50 and np.mean(above) >= .95*(1-sure): enough.append(conf)
    return min(enough)

def hide(zs, hidden):
    "The same logits; a peer from which an item is hidden gets no gradient from it"
    hidden = torch.tensor(hidden)[:,None]
    return [torch.where(hidden == m, z.detach(), z) for m,z in enumerate(zs)]

def with_votes(zs, values, y, kept, hidden, rule, pct):
    "The loss of the kept items and of those on which all peers surely agree; and how many these are"
    weight = np.clip((rule.rows[-1]['alike']-.5)/.3, 0, 1)*np.clip((pct-.2)/.3, 0, 1)
    votes,given,voted = [],[],[]
    for i,(z,peer) in enumerate(zip(values.swapaxes(0, 1), hidden)):
        p = softmax(z).mean(0)
        votes.append(p.argmax())
        sure = all(o.argmax() == p.argmax() for o in z) and p.max() >= rule.rows[-1]['cut']
        share = min(rule.labels[votes[-1]]/max(rule.votes[votes[-1]], 1e-6), 1)
        voted.append(weight*share if sure and (rule.k > 1 or peer < 0) else 0.)
        given.append(1-voted[-1] if i in kept else 0.)
    losses = [reference.joint_losses(zs, o, rule.lam) for o in (y, torch.as_tensor(np.array(votes)))]
    total = sum(w*o for each,shares in zip(losses, (given, voted)) for w,o in zip(shares, each) if w)
    return total/(sum(given)+sum(voted)), sum(o > 0 and i not in kept for i,o in enumerate(voted))

def held_fast(zs, values, hidden, idx, rule, pct):
    "What is added to the loss so that predictions stay near their running means (Liu et al. 2020)"
    total = 0.
    for j,(i,peer) in enumerate(zip(idx, hidden)):
        p = softmax(values[:,j]).mean(0)
        rule.means[i] = p if i not in rule.means else .7*rule.means[i]+.3*p
        t = torch.as_tensor(rule.means[i])
        total = total+sum(torch.log(1-(z[j].softmax(-1)*t).sum()) for z in zs)
    if not rule.rows: return 0.
    row = rule.rows[-1]
    weight = 2*np.clip((row['alike']-.5)/.3, 0, 1)*np.clip((pct-.2)/.3, 0, 1)
    weight *= np.clip((row['inside']-row['out']-.01)/.04, 0, 1)
    rule.held_fast = max(rule.held_fast, weight)
    return weight*total/len(idx)

def train(nets, batches, items, hidden, lr, n_classes=10, votes=False, early=False, **kwargs):
    "Train peers on batches `(epoch, x, y)`; gives the rule, the kept places of each batch, R and λ, and the interval"
    rule,opt = Rule(hidden, len(nets), n_classes, **kwargs),reference.adam(nets, lr)
    kept,rates,ends,seen,at = [],[],[],[],None
    for i,((epoch,x,y),idx) in enumerate(zip(batches, items)):
        if epoch != at:
            if seen: ends.append(rule.close(seen))
            at,seen,rule.owed = epoch,[],0.
            rates.append((rule.R, rule.lam))
        zs = [m(x) for m in nets]
        values = torch.stack(zs).detach().numpy()
        kept.append(rule.keep(rule.judge(values, y.numpy(), idx), idx))
        seen += list(zip(idx, values.swapaxes(0, 1), y.numpy()))
        from_whom = [rule.hidden[i] for i in idx]
        shown = hide(zs, from_whom)
        if votes and rule.rows:
            loss,n = with_votes(shown, values, y, kept[-1], from_whom, rule, i/len(batches))
            rule.voted_for += n
        else: loss = reference.joint_losses(shown, y, rule.lam)[torch.as_tensor(kept[-1])].mean()
        if early: loss = loss+held_fast(shown, values, from_whom, idx, rule, i/len(batches))
        reference.step(opt, loss)
    ends.append(rule.close(seen))
    return rule,kept,rates,ends
