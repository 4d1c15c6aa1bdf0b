package o7s_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"

	o7s "github.com/o7s/o7s-router/lib"
)

// A web server and a client of net/http over flows: all that changes is where
// the server gets its listener and how the client dials.
func ExampleDialer_http() {
	l, err := o7s.Listen(context.Background(), "web.example")
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello, this is %s%s", r.Host, r.URL.Path)
	})}
	go server.Serve(l)
	defer server.Close()

	client := &http.Client{Transport: &http.Transport{DialContext: new(o7s.Dialer).DialContext}}
	defer client.CloseIdleConnections()
	res, err := client.Get("http://web.example/page")
	if err != nil {
		log.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s: %s\n", res.Status, body)
	// Output: 200 OK: hello, this is web.example/page
}
