package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/lib/frcp"
)

// A transfer begins with a header of the size of the whole and of its messages,
// little-endian, which the receiver sends back, and ends with the receiver's
// Half, padded to replyLen. The header back starts the clock, and lets a flow
// know what its peer is: before, it takes no message longer than a packet.
const (
	headerLen = 16
	replyLen  = 512
	bufferLen = 256 << 10 // of the receiver, longer than any message
	seqLen    = 8         // each message starts with its number
	// byebye is how long a receiver waits for the sender to hang up: a reply
	// that is under way must not be thrown away with the connection.
	byebye = 2 * time.Second
)

var table = crc32.MakeTable(crc32.Castagnoli)

// Half is what one end of a transfer measured.
type Half struct {
	Bytes    int64   `json:"bytes"`
	Messages int64   `json:"messages"` // writes, or reads that gave something
	Sum      uint32  `json:"sum"`      // CRC-32C of all, in order; 0 when it was not asked for
	Seconds  float64 `json:"seconds"`  // receiver: from the first message to the last
	CPU      float64 `json:"cpu_s"`    // user and system time of the process, s
	Allocs   uint64  `json:"allocs"`   // heap objects
	Packets  Packets `json:"packets"`  // of a flow with the end-to-end protocol
}

// Packets are what the end-to-end protocol of a flow has sent.
type Packets struct {
	Sent, Resent, Control uint64 // data for the first time, again, without data
	RTOs                  uint64 // times that an acknowledgement was not there in time
}

// protocol is what flows have beyond a Link.
type protocol interface{ Stats() frcp.Stats }

func packets(l Link) (p Packets) {
	if f, ok := l.(protocol); ok {
		s := f.Stats()
		p = Packets{s.Sent, s.Resent, s.Control, s.RTOs}
	}
	return p
}

// Transfer is what came of it.
type Transfer struct {
	Sender, Receiver Half
	Seconds          float64 `json:"seconds"` // from the first write to the reply
}

// Size says what is sent.
type Size struct {
	Total, Message int64 // bytes
	// Sum makes both ends add up all bytes. Without it the receiver checks
	// the length and the number of each message: for links that preserve them.
	Sum bool
}

// usage is what the process has used so far.
type usage struct {
	cpu    float64
	allocs uint64
}

func used() (usage, error) {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return usage{}, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	cpu := float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
	return usage{cpu, m.Mallocs}, nil
}

func (h *Half) since(u usage) error {
	now, err := used()
	h.CPU, h.Allocs = now.cpu-u.cpu, now.allocs-u.allocs
	return err
}

// noise is content that no compression and no zero page makes easy.
var noise = sync.OnceValue(func() []byte {
	b := make([]byte, 1<<20+bufferLen)
	x := uint64(88172645463325252)
	for i := 0; i+8 <= len(b); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	return b
})

// Send transfers so much over a link, and checks that the receiver got it.
func Send(l Link, s Size) (Transfer, error) {
	var t Transfer
	if s.Message < seqLen || s.Message > bufferLen || s.Total < s.Message {
		return t, fmt.Errorf("transfer of %d bytes in messages of %d: expected messages of %d to %d bytes", s.Total, s.Message, seqLen, bufferLen)
	}
	content := noise()
	msg := make([]byte, s.Message)
	head := make([]byte, headerLen)
	binary.LittleEndian.PutUint64(head, uint64(s.Total))
	binary.LittleEndian.PutUint32(head[8:], uint32(s.Message))
	if s.Sum {
		head[12] = 1
	}
	u, err := used()
	if err != nil {
		return t, err
	}
	if _, err := l.Write(head); err != nil {
		return t, fmt.Errorf("send header: %w", err)
	}
	if err := readFull(l, make([]byte, headerLen)); err != nil {
		return t, fmt.Errorf("header back: %w", err)
	}
	start := time.Now()
	h := &t.Sender
	for h.Bytes < s.Total {
		m := msg[:min(s.Message, s.Total-h.Bytes)]
		if s.Sum {
			copy(m, content[(h.Messages*4099)&(1<<20-1):])
		}
		if len(m) >= seqLen {
			binary.LittleEndian.PutUint64(m, uint64(h.Messages))
		}
		if s.Sum {
			h.Sum = crc32.Update(h.Sum, table, m)
		}
		if _, err := l.Write(m); err != nil {
			return t, fmt.Errorf("send byte %d of %d: %w", h.Bytes, s.Total, err)
		}
		h.Bytes += int64(len(m))
		h.Messages++
	}
	reply := make([]byte, replyLen)
	if err := readFull(l, reply); err != nil {
		return t, fmt.Errorf("reply after %d bytes: %w", h.Bytes, err)
	}
	t.Seconds = time.Since(start).Seconds()
	if err := h.since(u); err != nil {
		return t, err
	}
	h.Packets = packets(l)
	if err := json.Unmarshal(bytes.TrimRight(reply, " "), &t.Receiver); err != nil {
		return t, fmt.Errorf("reply: %w", err)
	}
	if r := &t.Receiver; r.Bytes != h.Bytes || r.Sum != h.Sum {
		return t, fmt.Errorf("sent %d bytes with checksum %08x, received %d with %08x", h.Bytes, h.Sum, r.Bytes, r.Sum)
	}
	return t, nil
}

// readFull is io.ReadFull for links whose Read may return nothing: flows mark
// the end of a message that fills the buffer with an empty read.
func readFull(l Link, b []byte) error {
	for n := 0; n < len(b); {
		k, err := l.Read(b[n:])
		n += k
		if err != nil && n < len(b) {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// Serve receives transfers until the context ends. What is wrong with one is
// the sender's to notice; it is given to report, too.
func Serve(ctx context.Context, l Listener, report func(error)) error {
	buffers := sync.Pool{New: func() any { return new([bufferLen]byte) }}
	for {
		c, err := l.Accept(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			buf := buffers.Get().(*[bufferLen]byte)
			defer buffers.Put(buf)
			defer c.Close()
			if err := receive(c, buf[:]); err != nil {
				report(err)
				return
			}
			if c.SetReadDeadline(time.Now().Add(byebye)) == nil {
				for {
					if _, err := c.Read(buf[:]); err != nil {
						return
					}
				}
			}
		}()
	}
}

func receive(l Link, buf []byte) error {
	head := buf[:headerLen]
	if err := readFull(l, head); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	total, size, sum := int64(binary.LittleEndian.Uint64(head)), int64(binary.LittleEndian.Uint32(head[8:])), head[12] != 0
	u, err := used()
	if err != nil {
		return err
	}
	if _, err := l.Write(head); err != nil {
		return fmt.Errorf("header back: %w", err)
	}
	var h Half
	var first time.Time
	for h.Bytes < total {
		n, err := l.Read(buf)
		if err != nil {
			return fmt.Errorf("byte %d of %d: %w", h.Bytes, total, err)
		}
		if n == 0 {
			continue
		}
		if h.Messages == 0 {
			first = time.Now()
		}
		if sum {
			h.Sum = crc32.Update(h.Sum, table, buf[:n])
		} else if want := min(size, total-h.Bytes); int64(n) != want || n >= seqLen && binary.LittleEndian.Uint64(buf) != uint64(h.Messages) {
			return fmt.Errorf("message %d: %d bytes with number %d, want %d", h.Messages, n, binary.LittleEndian.Uint64(buf), want)
		}
		h.Bytes += int64(n)
		h.Messages++
	}
	h.Seconds = time.Since(first).Seconds()
	if err := h.since(u); err != nil {
		return err
	}
	h.Packets = packets(l)
	reply, err := json.Marshal(h)
	if err != nil {
		return err
	}
	reply = append(reply, bytes.Repeat([]byte(" "), replyLen-len(reply))...)
	if _, err := l.Write(reply); err != nil {
		return fmt.Errorf("reply: %w", err)
	}
	return nil
}
