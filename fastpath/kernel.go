package fastpath

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/o7s/o7s-router/bpf"
	"github.com/o7s/o7s-router/fastpath/tables"
)

// Names of the programs.
const (
	progRouter = "xdp_o7s"
	progApp    = "xdp_app"
)

// bssMap is the section that holds the tables that are variables.
const bssMap = ".bss"

// kernel is the set of maps that all programs of a Plane share.
type kernel struct {
	spec   *ebpf.CollectionSpec
	maps   map[string]*ebpf.Map
	tables *tables.Tables
	pinDir string
}

// loadKernel creates the maps and maps the tables into this process.
func loadKernel(c tables.Config) (*kernel, error) {
	// Kernels before 5.11 account BPF memory to this limit; later ones do not
	// care, and a process without the right to raise it fails here for nothing.
	_ = rlimit.RemoveMemlock()
	spec, err := bpf.LoadRouter()
	if err != nil {
		return nil, fmt.Errorf("read BPF object: %w", err)
	}
	records := c.Records()
	sizes := map[string]int{
		bssMap:                   1,
		bpf.RouterMapFib8:        max(c.FIB8, 1),
		bpf.RouterMapVerdicts:    tables.MaxPorts,
		bpf.RouterMapDevs:        tables.MaxPorts,
		bpf.RouterMapXsks:        tables.MaxPorts * tables.QueuesPerPort,
		bpf.RouterMapDtCounters:  tables.MaxWires * tables.Cubes,
		bpf.RouterMapAppCounters: c.Apps,
	}
	for _, name := range tables.Maps {
		sizes[name] = records[name]
	}
	for name, n := range sizes {
		spec.Maps[name].MaxEntries = uint32(n)
	}
	if err := spec.Variables["flow_buckets"].Set(uint32(c.FlowBuckets)); err != nil {
		return nil, fmt.Errorf("set table size: %w", err)
	}
	// The section's contents are zeros, which a new map has anyway.
	bss := spec.Maps[bssMap]
	bss.Contents = nil
	bss.Flags |= unix.BPF_F_MMAPABLE
	offsets := map[string]int{}
	for _, name := range tables.Variables {
		offsets[name] = int(spec.Variables[name].Offset)
		delete(spec.Variables, name) // or each load maps the section
	}

	k := &kernel{spec: spec, maps: map[string]*ebpf.Map{}}
	for name := range sizes {
		m, err := ebpf.NewMap(spec.Maps[name])
		if err != nil {
			k.close()
			return nil, fmt.Errorf("create BPF map %s: %w", name, err)
		}
		k.maps[name] = m
	}
	mem := map[string][]byte{}
	for _, name := range append([]string{bssMap}, tables.Maps...) {
		m := k.maps[name]
		b, err := mmap(m)
		if err != nil {
			unmap(mem)
			k.close()
			return nil, fmt.Errorf("map BPF map %s: %w", name, err)
		}
		mem[name] = b
	}
	views := maps.Clone(mem)
	for name, offset := range offsets {
		views[name] = mem[bssMap][offset:]
	}
	if k.tables, err = tables.View(c, views); err != nil {
		unmap(mem)
		k.close()
		return nil, err
	}
	// The mapping lives as long as anybody can reach the tables, so a late
	// reader after Close finds stale memory, not a fault.
	runtime.AddCleanup(k.tables, unmap, mem)

	// Nothing is attached yet: this tells whether the kernel takes the program.
	prog, err := k.program(progRouter, 0, nil)
	if err != nil {
		k.close()
		return nil, err
	}
	_ = prog.Close()
	return k, nil
}

// mmap maps the values of an array into this process.
func mmap(m *ebpf.Map) ([]byte, error) {
	page := os.Getpagesize()
	n := (int(m.ValueSize())+7)/8*8*int(m.MaxEntries()) + page - 1
	return unix.Mmap(m.FD(), 0, n/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

func unmap(mem map[string][]byte) {
	for _, b := range mem {
		_ = unix.Munmap(b) // only fails for a bad range
	}
}

// program loads a program for the port in slot. vars sets further constants of
// the program. The caller closes it.
func (k *kernel) program(name string, slot uint32, vars map[string]any) (*ebpf.Program, error) {
	spec := k.spec.Copy()
	for n := range spec.Programs {
		if n != name {
			delete(spec.Programs, n)
		}
	}
	if err := spec.Variables["port_slot"].Set(slot); err != nil {
		return nil, fmt.Errorf("set port of %s: %w", name, err)
	}
	for v, value := range vars {
		if spec.Variables[v] == nil {
			return nil, fmt.Errorf("program %s has no constant %s", name, v)
		}
		if err := spec.Variables[v].Set(value); err != nil {
			return nil, fmt.Errorf("set %s of %s: %w", v, name, err)
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: k.maps})
	if err != nil {
		return nil, fmt.Errorf("load BPF program %s: %w", name, err)
	}
	defer coll.Close()
	return coll.DetachProgram(name), nil
}

const bpffsMagic = 0xcafe4a11

// pin mounts a BPF file system at dir, if there is none, and pins the maps.
// What an earlier instance left there is replaced.
func (k *kernel) pin(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if int64(st.Type) != bpffsMagic {
		if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("mount BPF file system: %w", err)
		}
	}
	k.pinDir = dir
	for name, m := range k.maps {
		if name == bssMap {
			name = "tables" // the file system takes no dots
		}
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := m.Pin(path); err != nil {
			return err
		}
	}
	return nil
}

// close removes the pins and releases the maps.
func (k *kernel) close() error {
	var errs []error
	for _, m := range k.maps {
		if k.pinDir != "" {
			if err := m.Unpin(); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		errs = append(errs, m.Close())
	}
	if k.pinDir != "" {
		// Also what a killed instance mounted; a directory of somebody else's
		// file system is no mount point.
		if err := unix.Unmount(k.pinDir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", k.pinDir, err))
		}
	}
	return errors.Join(errs...)
}

// setDevice fills or empties (ifindex 0) a slot of the device map.
func (k *kernel) setDevice(slot uint32, ifindex int) error {
	m := k.maps[bpf.RouterMapDevs]
	if ifindex == 0 {
		if err := m.Delete(slot); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		return nil
	}
	return m.Put(slot, uint32(ifindex))
}

// setSocket enters an AF_XDP socket for a queue of a port, fd < 0 removes it.
func (k *kernel) setSocket(slot uint32, queue, fd int) error {
	if queue < 0 || queue >= tables.QueuesPerPort {
		return fmt.Errorf("receive queue %d: at most %d queues are served", queue, tables.QueuesPerPort)
	}
	m := k.maps[bpf.RouterMapXsks]
	key := slot*tables.QueuesPerPort + uint32(queue)
	if fd < 0 {
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		return nil
	}
	return m.Put(key, uint32(fd))
}

// verdicts returns a port's counters, summed over the CPUs.
func (k *kernel) verdicts(slot uint32) (sum [bpf.NumReasons]uint64) {
	var cpus []bpf.RouterVerdictCount
	if k.maps[bpf.RouterMapVerdicts].Lookup(slot, &cpus) != nil {
		return sum // only after Close
	}
	for _, c := range cpus {
		for r := range sum {
			sum[r] += c.N[r]
		}
	}
	return sum
}

// wireCounters returns the counters of a wire, summed over the CPUs.
func (k *kernel) wireCounters(wire uint32) (sum [tables.Cubes]DTCounters) {
	for cube := range sum {
		var cpus []bpf.RouterDtCount
		if k.maps[bpf.RouterMapDtCounters].Lookup(wire*tables.Cubes+uint32(cube), &cpus) != nil {
			return sum // only after Close
		}
		for _, c := range cpus {
			for which := range tables.DTCounters {
				n := sum[cube].at(which)
				n.Packets += c.C[which].Packets
				n.Bytes += c.C[which].Bytes
			}
		}
	}
	return sum
}

// appCounters returns the counters of an application handle's slot.
func (k *kernel) appCounters(slot uint32) (rx, tx Count) {
	var cpus []bpf.RouterAppCount
	if k.maps[bpf.RouterMapAppCounters].Lookup(slot, &cpus) != nil {
		return rx, tx // only after Close
	}
	for _, c := range cpus {
		rx.Packets += c.Rx.Packets
		rx.Bytes += c.Rx.Bytes
		tx.Packets += c.Tx.Packets
		tx.Bytes += c.Tx.Bytes
	}
	return rx, tx
}

// zero clears a per-CPU record whose slot gets a new owner.
func zero[T any](m *ebpf.Map, key uint32) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	return m.Put(key, make([]T, cpus))
}
