// Package journal remembers the flows of an Ethernet layer beyond the life of
// the daemon. A daemon that is killed cannot tell its peers, who would wait for
// the peer time-out (two minutes by default): the daemon that takes its place
// reads who they were and tells them (spec 50 §5).
//
// The journal is a small file that is mapped into memory: a note costs one
// store and no system call, and what was stored is there however the process
// ended. It need not survive the machine, so it is never synced.
package journal

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Entry is a flow: our endpoint, and the peer's MAC and endpoint.
type Entry struct {
	Local, Remote uint16
	MAC           [6]byte
}

// Header: magic, own MAC, EtherType, number of slots.
const (
	magic     = "o7sflow1"
	headerLen = 32
	slotLen   = 8
)

// Journal is the notes of one IPC process. Methods are safe for concurrent use;
// those of nil do nothing.
type Journal struct {
	path  string
	mu    sync.RWMutex // guards mem against Close
	mem   []byte       // nil: closed
	slots int
}

// Open maps the journal at path for endpoints below slots and returns what is
// left in it of an earlier process with the same MAC and EtherType. That is
// noted no more. A file that is none of ours, or of another interface, is
// replaced. The directory is made if needed.
func Open(path string, mac [6]byte, etherType uint16, slots int) (*Journal, []Entry, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, nil, fmt.Errorf("journal: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("journal: %w", err)
	}
	defer f.Close()
	size := headerLen + slots*slotLen
	header := make([]byte, headerLen)
	copy(header, magic)
	copy(header[8:], mac[:])
	binary.BigEndian.PutUint16(header[14:], etherType)
	binary.BigEndian.PutUint32(header[16:], uint32(slots))

	found := make([]byte, headerLen)
	st, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("journal: %w", err)
	}
	if _, err := f.ReadAt(found, 0); err != nil || string(found) != string(header) || st.Size() != int64(size) {
		if err := f.Truncate(0); err != nil {
			return nil, nil, fmt.Errorf("journal: %w", err)
		}
		if err := f.Truncate(int64(size)); err != nil {
			return nil, nil, fmt.Errorf("journal: %w", err)
		}
		if _, err := f.WriteAt(header, 0); err != nil {
			return nil, nil, fmt.Errorf("journal: %w", err)
		}
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("journal: map %s: %w", path, err)
	}
	j := &Journal{path: path, mem: mem, slots: slots}
	var left []Entry
	for i := range slots {
		v := j.slot(i).Swap(0)
		if v == 0 {
			continue
		}
		e := Entry{Local: uint16(i), Remote: uint16(v)}
		for b := range e.MAC {
			e.MAC[b] = byte(v >> (56 - 8*b))
		}
		left = append(left, e)
	}
	return j, left, nil
}

// slot is the note on an endpoint: MAC in the high 48 bits, then the peer's
// endpoint; 0: none. The mapping is page-aligned, so each is aligned, too.
func (j *Journal) slot(local int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&j.mem[headerLen+local*slotLen]))
}

// Note keeps a flow that was made.
func (j *Journal) Note(e Entry) {
	v := uint64(e.Remote)
	for b, x := range e.MAC {
		v |= uint64(x) << (56 - 8*b)
	}
	j.store(e.Local, v)
}

// Strike forgets the flow at an endpoint.
func (j *Journal) Strike(local uint16) { j.store(local, 0) }

func (j *Journal) store(local uint16, v uint64) {
	if j == nil {
		return
	}
	j.mu.RLock()
	defer j.mu.RUnlock()
	if j.mem != nil && int(local) < j.slots {
		j.slot(int(local)).Store(v)
	}
}

// Close removes the file: whoever ends in order has told the peers.
func (j *Journal) Close() error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.mem == nil {
		return nil
	}
	mem := j.mem
	j.mem = nil
	if err := unix.Munmap(mem); err != nil {
		return fmt.Errorf("journal: unmap: %w", err)
	}
	if err := os.Remove(j.path); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}
