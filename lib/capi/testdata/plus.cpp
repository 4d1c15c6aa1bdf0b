// The headers in C++: types, constants, and calls with C linkage.
#include <ouroboros/dev.h>
#include <ouroboros/errno.h>
#include <ouroboros/fccntl.h>
#include <ouroboros/fqueue.h>

#include <iostream>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

static_assert(std::is_standard_layout<qosspec_t>::value, "a C structure");
static_assert(FLOWFDEFAULT == 8194 && FLOWFNONBLOCK == 1536 && FRCTGFLAGS == 1024, "flags");
static_assert(FLOW_PKT == 1 && FLOW_PEER == 32, "events");
static_assert(ENOTALLOC == 1000 && ECRYPT == 1008, "errors");

namespace {

bool talk(const std::string & name)
{
        qosspec_t   qs = qos_data;
        int         fd = flow_alloc(name.c_str(), &qs, nullptr);
        std::string text = "hello";
        char        buf[16];

        if (fd < 0)
                return false;

        bool ok = flow_write(fd, text.data(), text.size()) == ssize_t(text.size()) &&
                  flow_read(fd, buf, sizeof(buf)) == ssize_t(text.size()) &&
                  text == std::string(buf, text.size());

        return flow_dealloc(fd) == 0 && ok;
}

}

int main(int argc, char ** argv)
{
        std::vector<std::thread> threads;
        std::vector<int>         ok(4);
        int                      sum = 0;

        for (auto & r : ok)
                threads.emplace_back([&r, argc, argv] { r = talk(argc > 1 ? argv[1] : "c.server"); });
        for (auto & t : threads)
                t.join();
        for (auto r : ok)
                sum += r;

        const qosspec_t * all[] = { &qos_raw, &qos_raw_no_errors, &qos_best_effort, &qos_video, &qos_voice, &qos_data };

        std::cout << sum << " threads talked, " << sizeof(all) / sizeof(all[0]) << " specifications" << std::endl;

        return sum == 4 ? 0 : 1;
}
