// Tile registers on and off. Included inside the unnamed namespace of a file for AMX.

// As the instruction wants it: eight tiles of 16 lines of 64 bytes.
struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The intrinsics of GCC 12 do not say that they read memory.
inline void settle() { asm volatile("" ::: "memory"); }

inline void tiles_on() {
    const Config config;
    settle();
    _tile_loadconfig(&config);
}

inline void tiles_off() { _tile_release(); }
