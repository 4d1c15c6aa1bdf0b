package frcp

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/o7s/o7s-router/lib/o7serr"
	"github.com/o7s/o7s-router/lib/packet"
	"github.com/o7s/o7s-router/lib/qos"
)

// Never is the Deadline of a Conn that waits for nothing.
const Never = int64(math.MaxInt64)

// Delta-t parameters (spec 30 §3.1).
const (
	maxAckTime = 10 * time.Second  // A
	maxRtxTime = 120 * time.Second // R
	defaultMPL = 100 * time.Millisecond
)

const (
	unsentMax    = 128     // packets that may wait behind the pacer: enough for a burst
	startWindow  = 64      // packets we may send before the first grant (spec 30 §3)
	refWindow    = 256     // packets granted to a reference peer: its own constant
	maxWindow    = 1 << 15 // packets, bound of what a Config may ask for
	maxEdge      = 1 << 23 // a new right edge is at most this far ahead (oddity 13)
	updateEvery  = 32      // delivered packets after which an edge is volunteered (oddity 5)
	staleCredit  = 64      // packets per rendez-vous once the peer's edge is stale (oddity 14)
	staleAnswers = 2       // answers without a new edge that make it stale
	plausible    = 1 << 16 // an edge this near was computed from our sequence numbers
	dupThreshold = 3       // duplicate acknowledgements that mean a loss
	sweepMax     = 64      // packets sent again at once when time is up
	eosCopies    = 3       // of an end of stream on a flow without retransmission
	eosRepeats   = 8       // and so many more until it is acknowledged
	farewells    = 3       // acknowledgements after both ends of stream: nobody asks for the last one
	announces    = 4       // until the peer is heard of
)

const (
	ackDelay   = int64(10 * time.Millisecond) // as the reference (spec 30 §6)
	ackEvery   = 4                            // packets that end the delay early
	ackBulk    = 8                            // the same, of a run that was longer than a reference window
	rdvsEvery  = int64(100 * time.Millisecond)
	firstRTO   = int64(time.Second)
	minRTO     = int64(30 * time.Millisecond) // above the delay of acknowledgements (oddity 10)
	maxRTO     = int64(4 * time.Second)       // thirty attempts within R
	carrierGap = int64(5 * time.Millisecond)  // between repetitions that carry control fields
	announceIn = int64(200 * time.Millisecond)
	// eosEvery is when an end of stream goes again on a flow without
	// retransmission; each time it takes twice as long.
	eosEvery = int64(200 * time.Millisecond)
	// lastWords is for how long an end of stream is repeated to a peer that has
	// closed the flow and is not heard of any more.
	lastWords = int64(5 * time.Second)
	// endPatience is how long an end of stream that came before data on an ordered
	// flow waits for that, if packets do not die earlier.
	endPatience = int64(100 * time.Millisecond)
	// A sender continues its numbers this much longer than it must: the peer
	// counts whole seconds from arrivals, and takes a new run too early for
	// part of the old one.
	runSlack = 2 // s
)

const (
	defaultBuffer = 32 << 20 // bytes
)

// DefaultMaxMessage bounds what fragments are assembled to.
const DefaultMaxMessage = 1 << 20

// Errors of a Conn. They wrap the numbers of the application interface.
var (
	// ErrWouldBlock: nothing to read, or the window is closed.
	ErrWouldBlock = o7serr.Wrap(o7serr.EAGAIN, "frcp")
	// ErrTooLarge: the message does not fit into a packet and the peer cannot
	// assemble fragments, or it is longer than Config.MaxMessage.
	ErrTooLarge = o7serr.Wrap(o7serr.EMSGSIZE, "message too large for the flow")
	// ErrEmpty: an empty message would be a keep-alive.
	ErrEmpty = o7serr.Wrap(o7serr.EINVAL, "empty message")
	// ErrClosed: written after CloseWrite or Close, or read after Close.
	ErrClosed = o7serr.Wrap(o7serr.EPIPE, "flow is closed")
	// ErrDown: the peer acknowledged or answered nothing for 120 s (R).
	ErrDown = o7serr.Wrap(o7serr.EFLOWDOWN, "no answer from the peer")
	// ErrRunLost: the peer began anew while data of a reliable flow was missing.
	ErrRunLost = o7serr.Wrap(o7serr.EFLOWDOWN, "the peer lost data of a reliable flow")
)

// Cipher encrypts packets in place (spec 31 §2). Both calls see whole packets.
type Cipher interface {
	// Overhead gives the bytes in front of and behind the plaintext.
	Overhead() (prefix, suffix int)
	// Seal fills p, which is prefix, plaintext and suffix. It is called anew
	// for each transmission and must draw a fresh IV each time (oddity 3).
	Seal(p []byte) error
	// Open returns the plaintext within p, which it may overwrite.
	Open(p []byte) ([]byte, error)
}

// Config is what a Conn is made from.
type Config struct {
	QoS qos.Spec
	// MPL is the maximum packet life that the layer gives; 0: 100 ms.
	MPL time.Duration
	// MaxPacket is the longest packet that the layer carries, in bytes.
	MaxPacket int
	// MaxMessage bounds assembled messages; 0: DefaultMaxMessage.
	MaxMessage int
	// Window bounds how many packets may be on the way in each direction
	// between our own ends, once the path turns out to need them; 0: 32768,
	// which is the most. A reference peer is granted 256.
	Window int
	// Buffer bounds the bytes of received packets that wait for those before
	// them or for the program, about; 0: 32 MiB.
	Buffer int
	// Rand gives the first sequence number of each run. Required.
	Rand func() uint32
	// Codec is the header encoding; nil: Header12.
	Codec Codec
	// Cipher encrypts the flow; nil: it is not encrypted.
	Cipher Cipher
	// Plain hides what we are: no Ext bit, so the peer takes us for a reference
	// end, and so do we the peer. For tests.
	Plain bool
	// Spec is the algorithm of spec 30 §4-§8 alone, without what we do better:
	// Plain, a retransmission timer for each packet from 250 µs on, and
	// acknowledgements that follow what the program reads, 10 ms late. What
	// keeps it from getting stuck (oddities 1, 5, 13 and 14) stays. For
	// comparisons.
	Spec bool
}

// Stats counts since New.
type Stats struct {
	Sent, Resent, Control  uint64 // packets: data for the first time, again, without data
	Received, Delivered    uint64 // packets with a valid header; messages read
	Duplicate, OutOfWindow uint64 // data packets dropped
	Late, NoRun            uint64 // dropped: overtaken on an ordered flow; before a run
	Gaps                   uint64 // packets missing on an ordered flow
	Bad                    uint64 // CRC, decryption, header
	BadControl             uint64 // acknowledgement or edge refused
	Fragments              uint64 // fragments and partial messages dropped
	RTOs, FastRetransmits  uint64
	RTT                    time.Duration // smoothed; 0: no sample
	PathMTU                int           // longest packet that is sent now, bytes
	Probes                 uint64        // of the path's MTU
	Pieces                 uint64        // of packets that were too large for it
	BlackHoles             uint64        // times that packets of that length did not arrive any more
}

// Conn is one end of a flow. It is not safe for concurrent use. Its memory is
// bounded by the windows; one with little to do holds less than three kilobytes.
type Conn struct {
	codec        Codec
	cipher       Cipher
	rand         func() uint32
	pre, suf     int // of the cipher
	hdr, trailer int
	maxPayload   int
	fragMax      int // longest message that goes in one packet, for now
	maxMessage   int
	window       uint32 // most packets on the way
	buffer       int
	reliable     bool
	plain        bool
	spec         bool
	linger       bool
	ext          bool // the peer is one of ours
	heard        bool
	mpl          int64
	err          error
	sInact       int64 // s
	rInact       int64 // s, as the specification has it: for Quarantine
	rExpire      int64 // ns without data after which a run is over for us
	stats        Stats

	// Sender: packets [lwe, nxt) are outstanding, [nxt, seqno) wait for Poll.
	sRun            bool
	conf            bool // the peer has shown that it knows the run
	known           bool // it has acknowledged something of it
	lwe, nxt        uint32
	seqno, rwe      uint32
	sAct            int64 // ns, last packet of the run
	out             ring[slot]
	pend            *packet.Buf // a message that is being cut into fragments
	pendOff         int
	begun           bool // some fragments of it are queued
	wclosed         bool
	eosWanted       bool
	eosSent         bool
	eosLeft         int // copies
	eosTries        int8
	eosAt           int64 // the next repetition, without retransmission
	srtt, mdev      int64
	rto             int64
	backoff         uint8
	ackTime         int64 // ns, lwe moved
	recovering      bool
	recover         uint32
	sweep, sweepEnd uint32 // to be sent again because time was up
	cwnd            cwnd   // towards a reference end
	blocked         bool   // a writer waits
	blockedAt       int64
	rdvsAt          int64
	rdvsDue         bool
	rdvsOut         bool // sent, not answered
	stale           int
	lastRx          int64
	finalAck        bool
	closedAt        int64
	announceDue     bool
	announced       int8
	announceAt      int64
	gaveUp          bool // it was not acknowledged by a peer that had closed
	byes            int8
	quiet           bool // the peer sends nothing any more
	wasOver         bool // both directions had ended when the flow failed

	// Sender of a reliable flow between our own ends.
	model                *model
	sacked               spanSet // what the peer has beyond lwe
	sackedN              int     // packets in it
	flight               chain   // packets on the way, as they were sent
	inFlight             uint64  // bytes of them
	lost                 chain   // packets to be sent again
	high                 uint32  // behind the highest that was delivered
	rackSent             int64   // when the newest packet that was delivered was sent
	rackSeq              uint32
	rackRTT              int64
	rackAt               int64 // then more may be lost
	reordered            bool  // packets overtake each other on this path
	patience, patientFor uint8 // see patient
	patientAt            uint32
	lastSent             int64
	probing              bool // the last packet was sent again, nothing was heard since
	probe                uint32
	probeDue             bool
	probedAt             int64

	mtu pmtu // between our own ends
	cut cut

	// Receiver: everything before next was received.
	rRun      bool
	virgin    bool // no data of the run has come
	next      uint32
	rEdge     uint32 // granted
	advEdge   uint32 // last edge the peer was told
	acked     uint32 // last acknowledgement sent
	rAct      int64  // ns, last packet
	rData     int64  // ns, last packet with data or a start of the run
	early     ring[arrival]
	earlyN    int
	partials  int       // packets in early of which some pieces are there
	ooo       spanSet   // the numbers of early
	tlv       []byte    // the payload of a control packet
	recent    [8]uint32 // numbers that came since the last acknowledgement, not in order
	recentN   int
	twice     uint32 // a number that came more than once
	twiceDue  bool
	granted   uint32 // packets: the window, as it has grown
	grown     uint32 // next when it did
	ready     ring[message]
	rHead     uint32
	rTail     uint32
	readyPkts uint32
	part      *packet.Buf // partial message
	partLen   int
	partLast  int // length of the last one
	partPkts  uint32
	cur       *packet.Buf // rest of a message that a short read left
	eos       bool
	endAt     int64  // then an end of stream is taken that may have overtaken data
	endSeq    uint32 // its number
	gone      bool   // the peer has closed
	rclosed   bool
	ackCount  int
	ackAt     int64
	ctlDue    bool
}

// New returns one end of a flow that was allocated now.
func New(cfg Config) (*Conn, error) {
	m := ModeOf(cfg.QoS)
	c := &Conn{
		codec: cfg.Codec, cipher: cfg.Cipher, rand: cfg.Rand,
		maxMessage: cfg.MaxMessage, window: maxWindow, granted: refWindow, buffer: cfg.Buffer,
		reliable: m == Reliable, linger: m == Reliable, plain: cfg.Plain || cfg.Spec, spec: cfg.Spec,
		rto: firstRTO, patience: 1, ackAt: Never, rdvsAt: Never, announceAt: Never, rackAt: Never, eosAt: Never, endAt: Never,
	}
	c.cwnd.disabled = !c.reliable || c.spec
	if m == Bare {
		return nil, errors.New("frcp: the qos of the flow does not ask for ordering")
	}
	if c.rand == nil {
		return nil, errors.New("frcp: no random source")
	}
	if c.codec == nil {
		c.codec = Header12{}
	}
	if c.maxMessage == 0 {
		c.maxMessage = DefaultMaxMessage
	}
	if c.buffer == 0 {
		c.buffer = defaultBuffer
	}
	if cfg.Window < 0 || cfg.Window > maxWindow {
		return nil, fmt.Errorf("frcp: window of %d packets is not within 1..%d", cfg.Window, maxWindow)
	} else if cfg.Window > 0 {
		c.window = uint32(cfg.Window)
	}
	c.granted = min(c.granted, c.window)
	c.hdr = c.codec.Len()
	if c.cipher != nil {
		c.pre, c.suf = c.cipher.Overhead()
	}
	if cfg.QoS.BER == 0 {
		c.trailer = CRCLen
	}
	c.maxPayload = cfg.MaxPacket - c.pre - c.hdr - c.suf - c.trailer
	if c.maxPayload < 1 {
		return nil, fmt.Errorf("frcp: packets of %d bytes have no room for data", cfg.MaxPacket)
	}
	c.fragMax, c.mtu.limit, c.mtu.most, c.mtu.at = c.maxPayload, cfg.MaxPacket, cfg.MaxPacket, Never
	mpl := cfg.MPL
	if mpl <= 0 {
		mpl = defaultMPL
	}
	c.mpl = int64(mpl)
	c.sInact = int64((3*mpl+maxAckTime+maxRtxTime)/time.Second) + 1
	c.rInact = int64((2*mpl+maxAckTime+maxRtxTime)/time.Second) + 1
	// A second early: the peer's clock ticks at another moment, and a new run
	// that is taken for part of the old one would be dropped for good. A is
	// reserve enough against packets of the old run.
	c.rExpire = int64(2*mpl + maxAckTime + maxRtxTime - time.Second)
	return c, nil
}

// Err is why the flow has failed, nil while it has not.
func (c *Conn) Err() error { return c.err }

// Stats returns the counters.
func (c *Conn) Stats() Stats {
	s := c.stats
	s.RTT, s.PathMTU = time.Duration(c.srtt), c.mtu.limit
	return s
}

// PeerExt reports whether the peer has shown that it is one of ours.
func (c *Conn) PeerExt() bool { return c.ext }

// Heard reports whether anything was heard of the peer at all.
func (c *Conn) Heard() bool { return c.heard }

// MaxPayload is the longest message that travels in one packet, in bytes.
func (c *Conn) MaxPayload() int { return c.maxPayload }

// FRCT flags of the application interface (spec 30 §12).
const (
	FlagRTX     = 1
	FlagRescntl = 2
	FlagLinger  = 4
)

// Flags returns the FRCT flags.
func (c *Conn) Flags() int {
	f := FlagRescntl
	if c.reliable {
		f |= FlagRTX
	}
	if c.linger {
		f |= FlagLinger
	}
	return f
}

// SetLinger chooses whether Done waits for acknowledgements. The other FRCT
// flags follow from the QoS and cannot be changed.
func (c *Conn) SetLinger(on bool) { c.linger = on && c.reliable }

// Abort makes the flow fail with err, which must not be nil: the layer or the
// peer has gone. Messages that have arrived can still be read.
func (c *Conn) Abort(err error) {
	if c.err == nil {
		c.fail(err)
	}
}

func (c *Conn) fail(err error) {
	c.err = err
	c.wasOver = c.over()
	for s := c.lwe; s != c.seqno; s++ {
		c.free(s)
	}
	c.lwe, c.nxt = c.seqno, c.seqno
	c.sweep = c.sweepEnd
	if c.pend != nil {
		c.pend.Release()
		c.pend = nil
	}
	c.dropEarly()
	c.dropPart()
	if c.endAt != Never {
		c.endHeld()
	}
	c.blocked, c.ctlDue, c.rdvsDue, c.announceDue = false, false, false, false
	c.ackAt, c.announceAt, c.eosAt, c.eosLeft, c.finalAck = Never, Never, Never, 0, false
	c.mtu.stop()
	c.clearFlight()
}

// over reports that both directions of a reliable flow between our own ends have
// ended and were acknowledged, as far as this end knows.
func (c *Conn) over() bool {
	return c.ext && c.reliable && c.eos && c.eosSent && c.lwe == c.seqno && !c.gaveUp
}

// farewell reports that an acknowledgement of the peer's end of stream is due.
// It goes several times: who has nothing to send any more releases the flow,
// and could not answer a repetition.
func (c *Conn) farewell() bool { return c.byes < farewells && c.over() }

// Close ends the flow (spec 30 §9): what was not read is dropped, an end of
// stream and a last acknowledgement are sent. Poll and Input go on until Done.
// Data that arrives meanwhile is acknowledged and dropped, so that two ends
// that close at once do not wait for each other.
func (c *Conn) Close(now int64) {
	if c.rclosed {
		return
	}
	c.rclosed, c.closedAt, c.byes = true, now, 0
	c.CloseWrite(now)
	if c.cur != nil {
		c.cur.Release()
		c.cur = nil
	}
	for ; c.rHead != c.rTail; c.rHead++ {
		m := c.ready.at(c.rHead)
		m.buf.Release()
		*m = message{}
	}
	c.readyPkts = 0
	c.dropPart()
	c.growWindow()
	c.finalAck = c.err == nil && c.rRun && c.ackNext() != c.acked && now-c.rAct <= int64(maxAckTime)
}

// Done reports, after Close, that nothing is left to do: all is sent and, if
// the flow lingers, acknowledged; or the flow has failed.
func (c *Conn) Done() bool {
	switch {
	case c.err != nil:
		return true
	case !c.rclosed || c.finalAck || c.farewell():
		return false
	case c.linger && c.lwe != c.seqno:
		return false
	}
	return c.nxt == c.seqno && c.pend == nil && c.eosLeft == 0 && (c.eosSent || !c.ext || !c.eosWanted)
}

// Release gives back all buffers. The Conn must not be used afterwards.
func (c *Conn) Release() {
	c.rclosed = false
	c.Close(0)
	c.fail(ErrClosed)
}

// Trim drops the memory of large windows, when nothing is under way. It may be
// called often: what a few packets take stays.
func (c *Conn) Trim() {
	if c.lwe == c.seqno {
		c.out.trim()
		c.sacked.s = nil
	}
	if c.earlyN == 0 && c.partials == 0 {
		c.early.trim()
		c.ooo.s = nil
	}
	if c.rHead == c.rTail {
		c.ready.trim()
	}
}

// Quarantine is how long the endpoint of the flow must not be reused. Delta-t
// (spec 30 §9) waits for packets that the peer may still repeat. A peer of ours
// whose end of stream we have, and that has said that nothing of its is
// unacknowledged, repeats nothing: only what is in the network has to die. One
// that was told several times that we have closed stops after lastWords, and
// should it miss all of that, what it repeats begins no run (see repeat).
func (c *Conn) Quarantine(now int64) time.Duration {
	if c.wasOver || c.err == nil && c.over() {
		switch {
		case c.quiet:
			return time.Duration(2 * c.mpl)
		case c.rclosed:
			return time.Duration(2*c.mpl + lastWords)
		}
	}
	var left int64
	if c.sRun {
		left = max(left, c.sInact-(sec(now)-sec(c.sAct)))
	}
	if c.rRun {
		left = max(left, c.rInact-(sec(now)-sec(c.rAct)))
	}
	return time.Duration(left) * time.Second
}

func sec(t int64) int64 { return t / int64(time.Second) }

// Deadline is when Poll is to be called next if no other call comes before: in
// the past if there is something to send now, Never if nothing is pending.
func (c *Conn) Deadline() int64 {
	if c.err != nil {
		return Never
	}
	if c.sendNow() {
		return 0
	}
	d := min(c.ackAt, c.announceAt, c.mtu.at, c.eosAt, c.endAt)
	if c.paced() {
		d = min(d, c.deadlineExt())
	} else {
		d = min(d, c.plainAt())
	}
	if c.endUnheard() {
		d = min(d, c.endGivenUp())
	}
	if c.rclosed && !c.Done() {
		d = min(d, c.closedAt+int64(maxRtxTime))
	}
	if c.blocked {
		d = min(d, c.rdvsAt, max(c.lastRx, c.blockedAt)+int64(maxRtxTime))
	}
	if c.reliable && c.lwe != c.nxt {
		d = min(d, c.out.at(c.lwe).first+int64(maxRtxTime))
		switch {
		case c.spec:
			d = min(d, c.specAt())
		case !c.paced():
			d = min(d, c.rtoAt())
		}
	}
	return d
}

func (c *Conn) sendNow() bool {
	return c.probeDue || c.sweep != c.sweepEnd || c.ctlDue || c.rdvsDue ||
		c.finalAck || c.announceDue || c.eosLeft > 0 || c.farewell() || c.mtu.due != 0 || c.mtu.answers > 0 || c.cut.on
}
