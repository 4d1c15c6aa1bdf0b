package o7s_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"syscall"
	"time"

	o7s "github.com/o7s/o7s-router/lib"
	"github.com/o7s/o7s-router/lib/qos"
)

// A server that answers messages, and its client. One Write is one message.
func Example() {
	ctx := context.Background()

	// The program has to be bound to the name, see `irm bind`.
	go func() {
		f, err := o7s.Accept(ctx)
		if err != nil {
			log.Print(err)
			return
		}
		defer f.Close()
		buf := make([]byte, 1500)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return // io.EOF: the client is done
			}
			fmt.Fprintf(f, "%d bytes: %s", n, buf[:n])
		}
	}()

	f, err := o7s.Alloc(ctx, "echo.example", &qos.Data)
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	f.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 1500)
	for _, m := range []string{"one", "two", "three"} {
		if _, err := f.Write([]byte(m)); err != nil {
			log.Fatal(err)
		}
		n, err := f.Read(buf)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s\n", buf[:n])
	}
	// Output:
	// 3 bytes: one
	// 3 bytes: two
	// 5 bytes: three
}

// A server of many clients with one goroutine for all of them: it waits for the
// events of a set, and its reads do not wait.
func ExampleSet() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	set := o7s.NewSet()
	defer set.Close()

	go func() { // new flows go into the set
		for {
			f, err := o7s.Accept(ctx)
			if err != nil {
				return
			}
			f.SetFlags(f.Flags() | o7s.RNOBLOCK)
			if err := set.Add(f); err != nil {
				f.Close()
			}
		}
	}()
	go func() {
		events := make([]o7s.SetEvent, 64)
		buf := make([]byte, 1500)
		for {
			n, err := set.Wait(events, -1)
			if err != nil {
				return // net.ErrClosed
			}
			for _, e := range events[:n] {
				for {
					n, err := e.Flow.Read(buf)
					if errors.Is(err, syscall.EAGAIN) {
						break // that was all
					}
					if err != nil { // io.EOF: the client is done
						e.Flow.Close() // also takes it out of the set
						break
					}
					fmt.Fprintf(e.Flow, "hello, %s", buf[:n])
				}
			}
		}
	}()

	for _, who := range []string{"Ann", "Bob"} {
		f, err := o7s.Alloc(ctx, "many.example", &qos.Data)
		if err != nil {
			log.Fatal(err)
		}
		defer f.Close()
		fmt.Fprint(f, who)
		buf := make([]byte, 1500)
		n, err := f.Read(buf)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s\n", buf[:n])
	}
	// Output:
	// hello, Ann
	// hello, Bob
}

// An echo server for streams, which is what one for TCP looks like, and its
// client.
func ExampleListen() {
	ctx := context.Background()
	l, err := o7s.Listen(ctx, "stream.example")
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // net.ErrClosed
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()

	c, err := o7s.Dial(ctx, "stream.example")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintln(c, "hello, world")
	c.(*o7s.Conn).CloseWrite() // the server reads to the end
	io.Copy(os.Stdout, c)
	// Output: hello, world
}

// What went wrong, in the words of package net and of this one.
func ExampleDialer_DialConn() {
	d := &o7s.Dialer{Timeout: time.Second}
	_, err := d.DialConn(context.Background(), "nobody")
	var ne net.Error
	switch {
	case errors.Is(err, o7s.ErrName):
		fmt.Println("no such name")
	case errors.Is(err, o7s.ErrUnreachable):
		fmt.Println("no layer knows the way")
	case errors.As(err, &ne) && ne.Timeout():
		fmt.Println("no answer in time")
	}
	// Output: no such name
}
